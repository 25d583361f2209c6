"""The stand-in for the CUDA runtime, built from `cudart.c` and loaded as torch loads the real one."""

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

REGISTER, UNREGISTER = 0, 1
"""Calls that can be made to fail."""


class Runtime:
    """What tests ask of the library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.stand_in_write.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        library.stand_in_is_locked.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        library.stand_in_locked_bytes.restype = ctypes.c_size_t
        library.stand_in_contexts.restype = ctypes.c_ulong
        library.cudaHostRegister.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
        library.cudaHostUnregister.argtypes = (ctypes.c_void_p,)

    def fail(self, call: int, code: int, *, after: int = 0, times: int = 1) -> None:
        """Let a call fail so many times, after so many that succeed."""
        self._library.stand_in_fail(call, code, after, times)

    def register(self, address: int, size: int) -> int:
        return int(self._library.cudaHostRegister(address, size, 1))

    def write(self, target: int, source: int, size: int) -> int:
        """Write to host memory as a GPU does, and return the code."""
        return int(self._library.stand_in_write(target, source, size))

    def is_locked(self, address: int, size: int) -> bool:
        return bool(self._library.stand_in_is_locked(address, size))

    @property
    def locked_bytes(self) -> int:
        return int(self._library.stand_in_locked_bytes())

    @property
    def last_error(self) -> int:
        """The error that the next kernel launch of this thread would raise."""
        return int(self._library.cudaPeekAtLastError())

    def take_error(self) -> int:
        """Return the last error of this thread, and forget it."""
        return int(self._library.cudaGetLastError())

    @property
    def contexts(self) -> set[int]:
        """The devices on which some thread has created a context."""
        mask = int(self._library.stand_in_contexts())
        return {index for index in range(64) if mask >> index & 1}

    @property
    def device(self) -> int:
        """The current device of this thread."""
        index = ctypes.c_int()
        self._library.cudaGetDevice(ctypes.byref(index))
        return index.value

    @device.setter
    def device(self, index: int) -> None:
        self._library.cudaSetDevice(index)

    def reset(self) -> None:
        self._library.stand_in_reset()


@functools.cache
def runtime() -> Runtime:
    """Build and load the library, once in a process; skip the test where there is no compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    # The product finds it among the files that this process has mapped, and opens it once more.
    folder = Path(tempfile.mkdtemp(prefix="gpu_stand_in"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, path = Path(__file__).with_name("cudart.c"), folder / "libcudart.so.13"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", path, source], check=True, timeout=120)
    return Runtime(ctypes.CDLL(str(path)))
