"""Page-lock host memory through the CUDA runtime, so that GPUs copy to it while the CPU does other work.

A GPU goes on writing to the pages that were locked, whatever is mapped at their addresses by then. So a lock must end
before its memory is unmapped, and memory whose lock cannot be ended must stay mapped.
"""

import ctypes
import logging
from pathlib import Path

from keepwarm.ft.errors import PageLockFailed

_PORTABLE = 1
"""The flag that makes memory count as page-locked for all GPUs of the process."""


class PageLock:
    """Locked ranges of memory, until `end`."""

    def __init__(self, address: int, size: int, step: int) -> None:
        """Lock `size` bytes at `address`, in ranges of `step` bytes: CUDA serves other threads in between.

        Call it on a thread whose current device is the one that will copy. Raise `PageLockFailed`, with nothing locked.
        """
        self._runtime = _Runtime()
        self._ranges: list[int] = []
        for start in range(address, address + size, step):
            length = min(step, address + size - start)
            failure = self._runtime.register(start, length)
            if failure:
                self.end()
                raise PageLockFailed(f"cudaHostRegister of {length} bytes of snapshot memory: {failure}")
            self._ranges.append(start)

    def end(self) -> bool:
        """Unlock the memory. Return False if that fails: a GPU may still write to its pages."""
        failures = {start: self._runtime.unregister(start) for start in self._ranges}
        self._ranges = [start for start, failure in failures.items() if failure]
        if self._ranges:
            logging.warning(
                "snapshot memory stays page-locked until this process ends: cudaHostUnregister: %s",
                failures[self._ranges[0]],
            )
        return not self._ranges


class _Runtime:
    """Two calls of the CUDA runtime that torch has loaded. A failure is a text, an empty one is success."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_loaded("libcudart"))
        except OSError as error:
            raise PageLockFailed(f"snapshot memory cannot be page-locked: {error}") from error
        self._library.cudaHostRegister.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
        self._library.cudaHostUnregister.argtypes = (ctypes.c_void_p,)
        self._library.cudaGetErrorString.argtypes = (ctypes.c_int,)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def register(self, address: int, size: int) -> str:
        return self._text(self._library.cudaHostRegister(address, size, _PORTABLE))

    def unregister(self, address: int) -> str:
        return self._text(self._library.cudaHostUnregister(address))

    def _text(self, code: int) -> str:
        if code == 0:
            return ""
        # The next kernel launch of this thread would raise what is left here.
        self._library.cudaGetLastError()
        text: bytes = self._library.cudaGetErrorString(code) or b""
        return f"error {code}, {text.decode(errors='replace')}"


def _loaded(name: str) -> str:
    """Return the path of a library mapped by this process. Raise `OSError` if there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(name):
            return path
    raise OSError(f"{name} is not loaded")
