"""Stands for `pynvml`: the same names, with GPUs that a test sets. `test_gpu_health.py` compares them."""

# ruff: noqa: N801, N802, N815, N816

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
NVML_VOLATILE_ECC = 0
NVML_NVLINK_MAX_LINKS = 36
NVML_FEATURE_ENABLED = 1
NVML_NVLINK_ERROR_DL_REPLAY = 0
NVML_NVLINK_ERROR_DL_RECOVERY = 1
NVML_NVLINK_ERROR_DL_CRC_FLIT = 2
NVML_NVLINK_ERROR_DL_CRC_DATA = 3
nvmlEventTypeXidCriticalError = 8
nvmlClocksEventReasonHwSlowdown = 0x08
nvmlClocksEventReasonSwThermalSlowdown = 0x20
nvmlClocksEventReasonHwThermalSlowdown = 0x40
nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80


class NVMLError(Exception):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_Timeout(NVMLError):
    pass


@dataclass(kw_only=True)
class FakeGpu:
    """A healthy H100, unless a test says otherwise."""

    uuid: str
    uncorrected: int = 0
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)
    clocks: int = 0
    links: list[int] = field(default_factory=lambda: [0, 0])
    """Errors of each active NVLink."""
    lost: bool = False
    supports: bool = True
    """Whether it has ECC and events; consumer GPUs do not."""


class Event(NamedTuple):
    device: FakeGpu
    eventType: int
    eventData: int


class FakeNvml:
    """The functions; the constants and errors are those of this module."""

    def __init__(self, *gpus: FakeGpu) -> None:
        self.gpus = list(gpus)
        self.broken: str | None = None
        """Why there is no driver."""
        self.xids: queue.SimpleQueue[tuple[FakeGpu, int]] = queue.SimpleQueue()
        self.open = 0
        self.watched: list[FakeGpu] = []
        self.before_look: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return globals()[name]

    def nvmlInit(self) -> None:
        if self.broken is not None:
            raise NVMLError(self.broken)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self.before_look()
        return "575.57.08"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, kind: int, counter: int) -> int:
        return int(self._of(gpu).uncorrected)

    def nvmlDeviceGetRemappedRows(self, gpu: FakeGpu) -> tuple[int, int, int, int]:
        return self._of(gpu).rows

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu) -> int:
        return self._of(gpu).clocks

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:
        if link >= len(self._of(gpu).links):
            raise NVMLError_NotSupported
        return NVML_FEATURE_ENABLED

    def nvmlDeviceGetNvLinkErrorCounter(self, gpu: FakeGpu, link: int, counter: int) -> int:
        return gpu.links[link] if counter == NVML_NVLINK_ERROR_DL_REPLAY else 0

    def nvmlEventSetCreate(self) -> list[int]:
        return []

    def nvmlDeviceRegisterEvents(self, gpu: FakeGpu, kinds: int, events: list[int]) -> None:
        self._of(gpu)
        self.watched.append(gpu)

    def nvmlEventSetWait_v2(self, events: list[int], milliseconds: int) -> Event:
        try:
            gpu, xid = self.xids.get(timeout=milliseconds / 1000)
        except queue.Empty:
            raise NVMLError_Timeout from None
        return Event(gpu, nvmlEventTypeXidCriticalError, xid)

    def nvmlEventSetFree(self, events: list[int]) -> None:
        pass

    def _of(self, gpu: FakeGpu) -> FakeGpu:
        if gpu.lost:
            raise NVMLError_GpuIsLost("GPU is lost")
        if not gpu.supports:
            raise NVMLError_NotSupported("Not Supported")
        return gpu
