"""Shared memory mapped where huge pages fit. Small pages are given to a mapping one by one, a tenth of a second for a
GB, and every process that maps the memory pays for it anew; huge ones cost nothing.
"""

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from keepwarm.ft.arrays import Bytes

# MADV_POPULATE_*, Linux 5.14, and MADV_COLLAPSE, Linux 6.1. Through ctypes: the mmap module knows none of them and
# holds the lock of the interpreter meanwhile.
POPULATE_READ, POPULATE_WRITE, _COLLAPSE = 22, 23, 25
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_FIXED, _NO_RESERVE = 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _huge_page() -> int:
    """Bytes of one; those of a small page where the kernel has none of a size that is worth it."""
    with contextlib.suppress(OSError, ValueError):
        size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
        if mmap.PAGESIZE < size <= 32 << 20:
            return size
    return mmap.PAGESIZE


HUGE_PAGE = _huge_page()


class MappedMemory:
    """A file's first `size` bytes, shared and writable. `numpy.asarray` gives them; unmapped with the last view."""

    def __init__(self, descriptor: int, size: int) -> None:
        """`size` > 0. Raises `OSError`; the descriptor stays the caller's."""
        self._length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._address = 0
        # Huge pages need an address that is a multiple of theirs: taken out of a larger range that is reserved first.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        reserved = _map(None, self._length + HUGE_PAGE, _NONE, private, -1)
        address = -(-reserved // HUGE_PAGE) * HUGE_PAGE
        end = reserved + self._length + HUGE_PAGE
        try:
            self._address = _map(address, self._length, _READ_WRITE, mmap.MAP_SHARED | _FIXED, descriptor)
        except OSError:
            _libc.munmap(reserved, self._length + HUGE_PAGE)
            raise
        for start, stop in ((reserved, address), (address + self._length, end)):
            if start < stop:
                _libc.munmap(start, stop - start)
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}

    def gather(self, data: Bytes) -> None:
        """Put new memory, `data` of which is all zeros, into huge pages where the kernel can; never an error.

        Only whole ones, so that no memory is taken beyond the size.
        """
        whole = len(data) // HUGE_PAGE * HUGE_PAGE
        if HUGE_PAGE > mmap.PAGESIZE and whole:
            data[:whole:HUGE_PAGE] = 0  # what has no page yet is not collapsed
            _libc.madvise(self._address, whole, _COLLAPSE)

    def populate(self, start: int, stop: int, advice: int) -> bool:
        """Give the pages from `start`, the beginning of one, to `stop` their memory; whether the kernel can."""
        return bool(_libc.madvise(self._address + start, stop - start, advice) == 0)

    def __del__(self) -> None:
        if self._address:
            _libc.munmap(self._address, self._length)


def _map(address: int | None, length: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, length, protection, flags, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


def view(mapping: MappedMemory) -> Bytes:
    """Its memory; keeps it mapped."""
    data: Bytes = np.asarray(mapping)
    return data
