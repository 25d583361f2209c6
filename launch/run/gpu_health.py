"""What NVML says of this machine's GPUs. Needs `nvidia-ml-py`; without it, or without a driver, says why it is skipped.

NVML reads counters of the driver: it starts nothing on a GPU, and works while workers use them.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

INSTALL = "nvidia-ml-py is not installed: pip install 'keepwarm[gpu]'"
THROTTLES = {
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "too hot (slowed by the driver)",
    "nvmlClocksEventReasonHwThermalSlowdown": "too hot (slowed by the hardware)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
"""Reasons for low clocks that a healthy GPU under load does not have. A cap of its power is not among them."""
LINK_ERRORS = (
    "NVML_NVLINK_ERROR_DL_REPLAY", "NVML_NVLINK_ERROR_DL_RECOVERY", "NVML_NVLINK_ERROR_DL_CRC_FLIT",
    "NVML_NVLINK_ERROR_DL_CRC_DATA",
)  # fmt: skip


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU. None: this GPU or this driver does not say."""

    index: int
    name: str = ""
    uuid: str = ""
    lost: str = ""
    """Why it cannot be asked; empty if it can."""
    uncorrected: int | None = None
    """Uncorrectable ECC errors since the driver was loaded."""
    remap_pending: bool | None = None
    """Rows of its memory are replaced at the next reset."""
    remap_failed: bool | None = None
    throttled: tuple[str, ...] = ()
    link_errors: int | None = None
    """Errors on its NVLinks since the counters were reset."""


class Gpus(msgspec.Struct, frozen=True, kw_only=True):
    """All GPUs that this process may use."""

    skipped: str = ""
    """Why NVML was not asked; empty if it was."""
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()


def library() -> Any:
    """Return the NVML bindings, initialised; raise `Unavailable` with the reason."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise Unavailable(INSTALL) from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise Unavailable(f"NVML: {error}") from error
    return nvml


class Unavailable(Exception):
    """NVML cannot be used here; the message says why."""


def look() -> Gpus:
    """Return what NVML says now. A driver that hangs does not return: call this on a thread, with a deadline."""
    try:
        nvml = library()
    except Unavailable as error:
        return Gpus(skipped=str(error))
    try:
        driver = nvml.nvmlSystemGetDriverVersion()
        gpus = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        return Gpus(driver=driver, gpus=visible(gpus, os.environ))
    except nvml.NVMLError as error:
        return Gpus(skipped=f"NVML: {error}")
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
    except nvml.NVMLError as error:
        return Gpu(index=index, lost=str(error))

    def ask(function: Callable[..., Any], *arguments: object) -> Any:
        """Return the answer; None where the GPU has none, as without ECC or NVLink."""
        try:
            return function(handle, *arguments)
        except nvml.NVMLError as error:
            if isinstance(error, nvml.NVMLError_GpuIsLost):
                raise
            return None

    try:
        wrong, counter = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        rows = ask(nvml.nvmlDeviceGetRemappedRows)
        clocks = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return Gpu(
            index=index,
            name=name,
            uuid=uuid,
            uncorrected=ask(nvml.nvmlDeviceGetTotalEccErrors, wrong, counter),
            remap_pending=None if rows is None else bool(rows[2]),
            remap_failed=None if rows is None else bool(rows[3]),
            throttled=tuple(text for flag, text in THROTTLES.items() if clocks & getattr(nvml, flag)),
            link_errors=_link_errors(nvml, ask),
        )
    except nvml.NVMLError_GpuIsLost as error:
        return Gpu(index=index, name=name, uuid=uuid, lost=str(error))


def _link_errors(nvml: Any, ask: Callable[..., Any]) -> int | None:
    found = None
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if ask(nvml.nvmlDeviceGetNvLinkState, link) != nvml.NVML_FEATURE_ENABLED:
            continue
        for name in LINK_ERRORS:
            count = ask(nvml.nvmlDeviceGetNvLinkErrorCounter, link, getattr(nvml, name))
            found = found if count is None else (found or 0) + count
    return found


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves to this process, all without it. Pure."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(gpus)
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return tuple(
        gpu for gpu in gpus if any(name == str(gpu.index) or (gpu.uuid and gpu.uuid.startswith(name)) for name in names)
    )


def problems(now: Gpus, before: Gpus | None = None) -> list[str]:
    """Return which GPUs are broken, so that their node must not train; empty if none is. Pure.

    An uncorrectable error of ECC is one only if it is new since `before`: the driver has dealt with older ones.
    """
    earlier = {} if before is None else {gpu.uuid: gpu for gpu in before.gpus if gpu.uuid}
    found = []
    for gpu in now.gpus:
        known = earlier.get(gpu.uuid)
        if gpu.lost:
            found.append(f"GPU {gpu.index} cannot be used: {gpu.lost}")
        elif gpu.remap_failed:
            found.append(f"GPU {gpu.index}: its memory is broken and cannot be remapped any more")
        elif known is not None and (gpu.uncorrected or 0) > (known.uncorrected or 0):
            new = (gpu.uncorrected or 0) - (known.uncorrected or 0)
            found.append(f"GPU {gpu.index}: {new} new uncorrectable ECC errors in its memory")
    gone = earlier.keys() - {gpu.uuid for gpu in now.gpus}
    if gone and not now.skipped and not any(gpu.lost for gpu in now.gpus):
        found += [f"GPU {earlier[uuid].index} is gone: the driver does not list it any more" for uuid in sorted(gone)]
    return found


def warnings(now: Gpus) -> list[str]:
    """Return what is wrong with GPUs that can still train. Pure."""
    found = []
    for gpu in now.gpus:
        if gpu.remap_pending:
            found.append(f"GPU {gpu.index} needs a reset: rows of its memory are to be remapped")
        if gpu.throttled:
            found.append(f"GPU {gpu.index} is slowed down: {', '.join(gpu.throttled)}")
        if gpu.link_errors:
            found.append(f"GPU {gpu.index}: {gpu.link_errors} NVLink errors since its counters were reset")
    return found
