"""Tell errors of broken GPUs from those of programs, by the codes and texts of CUDA. Pure and torch-free.

Such an error stays for the life of the process, and often for that of the driver: another start on the same node would
meet it again. Errors that a kernel with a bug causes as well (an illegal address, a failed launch) are not among them.
"""

import re
from collections.abc import Iterator

from keepwarm.trainer.errors import DeviceBroken

BROKEN: dict[int, str] = {
    46: "CUDA-capable device(s) is/are busy or unavailable",
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    226: "Invalid access of peer GPU memory over nvlink or a hardware error",
    714: "hardware stack error",
    802: "system not yet initialized",
}
"""`cudaError_t` by value, with what `cudaGetErrorString` says: the device is gone or was reset, its memory or its links
failed, or the fabric of the node is not up."""
OTHER_TEXTS = ("GPU is lost", "fallen off the bus", "Uncorrectable NVLink error", "uncorrectable NVLink error")
"""What drivers and NVML say in these cases."""
_PATTERN = re.compile("|".join(re.escape(text) for text in (*BROKEN.values(), *OTHER_TEXTS)))


def broken(error: BaseException) -> str | None:
    """Return the line of an error, or of one that caused it, that shows that a GPU is broken; None if none does."""
    for one in _chain(error):
        line = next((line.strip() for line in str(one).splitlines() if line.strip()), type(one).__name__)
        if isinstance(one, DeviceBroken):
            return line
        code = getattr(one, "error_code", None)
        if isinstance(code, int) and code in BROKEN:
            return f"{line} (CUDA error {code}: {BROKEN[code]})" if BROKEN[code] not in line else line
        for line in str(one).splitlines():
            if _PATTERN.search(line):
                return line.strip()
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, each once."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
