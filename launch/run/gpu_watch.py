"""Watch the GPUs of a node while a run trains: errors that the driver reports (Xid), and counters after a failure.

On a thread of its own, since a driver whose GPU has failed may not answer. Without NVML or GPUs there is no thread.
"""

import queue
import threading
from typing import Any

from keepwarm.launch.run import gpu_health
from keepwarm.launch.run.node_check import gpu_count

FATAL_XIDS = {
    48: "uncorrectable ECC error",
    62: "internal micro-controller halt",
    64: "rows of its memory could not be remapped",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "its system processor does not answer",
    120: "error of its system processor",
    140: "unrecovered ECC error",
    143: "GPU could not be initialised",
}
"""Errors of the hardware, after which a GPU needs a reset or a repair. Others, as 13, 31 and 43, come from programs."""
ANSWER_TIMEOUT_S = 10.0
WAIT_MS = 1000
"""How long one wait for errors takes, in milliseconds."""


class GpuWatch:
    """Remembers the fatal errors of this node's GPUs since `start`."""

    def __init__(self) -> None:
        self._before: gpu_health.Gpus | None = None
        self._xids: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch, if there are GPUs and NVML; call it before the workers of the first start."""
        if self._thread is not None or not gpu_count():
            return
        self._before = _within(ANSWER_TIMEOUT_S)
        if self._before is None or self._before.skipped:
            return
        self._thread = threading.Thread(target=self._wait, name="gpus", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """Return why this node must not train any more; None if it may. Takes ANSWER_TIMEOUT_S at most."""
        if self._thread is None:
            return None
        found = []
        while not self._xids.empty():
            found.append(self._xids.get())
        now = _within(ANSWER_TIMEOUT_S)
        if now is None:
            found.append(f"the driver of its GPUs has not answered within {ANSWER_TIMEOUT_S:g} s")
        else:
            found += gpu_health.problems(now, self._before)
        return "; ".join(found) or None

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _wait(self) -> None:
        try:
            nvml = gpu_health.library()
        except gpu_health.Unavailable:
            return
        try:
            events = nvml.nvmlEventSetCreate()
            names = _register(nvml, events, self._before)
            while not self._closed.is_set():
                try:
                    event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
                except nvml.NVMLError_Timeout:
                    continue
                if event.eventType == nvml.nvmlEventTypeXidCriticalError and event.eventData in FATAL_XIDS:
                    uuid = nvml.nvmlDeviceGetUUID(event.device)
                    if uuid in names:
                        xid = int(event.eventData)
                        self._xids.put(f"GPU {names[uuid]}: Xid {xid}, {FATAL_XIDS[xid]}")
            nvml.nvmlEventSetFree(events)
        except nvml.NVMLError:
            return  # events are not supported here; counters are read all the same
        finally:
            nvml.nvmlShutdown()


def _register(nvml: Any, events: Any, known: gpu_health.Gpus | None) -> dict[str, int]:
    """Ask for the errors of all GPUs of this node; return their indices by UUID."""
    names = {gpu.uuid: gpu.index for gpu in (known.gpus if known is not None else ()) if not gpu.lost}
    for index in names.values():
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
    return names


def _within(seconds: float) -> gpu_health.Gpus | None:
    """Return what NVML says; None if it does not answer in time."""
    found: queue.SimpleQueue[gpu_health.Gpus] = queue.SimpleQueue()
    threading.Thread(target=lambda: found.put(gpu_health.look()), name="nvml", daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return None
