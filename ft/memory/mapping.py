"""Shared memory mapped with huge pages where possible.

Small pages are added to a mapping one by one, which takes 0.1 s per GB in every process that maps the memory. With huge
pages that cost is negligible.
"""

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.memory.page_lock import PageLock

# MADV_POPULATE_*, Linux 5.14, and MADV_COLLAPSE, Linux 6.1. Called through ctypes: the mmap module lacks them and
# holds the GIL during madvise.
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
    """Return the huge page size, or the small page size if the kernel has no suitable huge pages."""
    with contextlib.suppress(OSError, ValueError):
        size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
        if mmap.PAGESIZE < size <= 32 << 20:
            return size
    return mmap.PAGESIZE


HUGE_PAGE = _huge_page()


class MappedMemory:
    """A file's first `size` bytes, shared and writable. View with `numpy.asarray`; unmapped with the last view."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map `size` > 0 bytes. The caller keeps ownership of the descriptor. Raise `OSError` on failure."""
        self._length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._address = 0
        self._lock: PageLock | None = None
        # Huge pages need an aligned address, so reserve a larger range first and map inside it.
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

    def gather(self, start: int, stop: int) -> None:
        """Collapse memory from `start`, aligned to huge pages, into huge pages if the kernel can. Never raise.

        Only whole huge pages are used, so that no memory beyond the size is allocated.
        """
        whole = (stop - start) // HUGE_PAGE * HUGE_PAGE
        if HUGE_PAGE > mmap.PAGESIZE and whole:
            for at in range(start, start + whole, HUGE_PAGE):  # only memory that already has pages is collapsed
                self.populate(at, at + mmap.PAGESIZE, POPULATE_WRITE)
            _libc.madvise(self._address + start, whole, _COLLAPSE)

    def populate(self, start: int, stop: int, advice: int) -> bool:
        """Populate the pages from `start` (page-aligned) to `stop`. Return whether the kernel can."""
        return bool(_libc.madvise(self._address + start, stop - start, advice) == 0)

    def lock(self, start: int, stop: int, step: int) -> None:
        """Page-lock bytes `start` to `stop` until `unlock`, at most once. Raise `PageLockFailed`."""
        if self._lock is None:
            self._lock = PageLock(self._address + start, stop - start, step)

    def unlock(self) -> bool:
        """End the lock; return False if that fails."""
        if self._lock is not None and self._lock.end():
            self._lock = None
        return self._lock is None

    def __del__(self) -> None:
        # Memory that a GPU may still write to keeps its address: whatever is mapped there next would be missed.
        if self._address and self.unlock():
            _libc.munmap(self._address, self._length)


def _map(address: int | None, length: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, length, protection, flags, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


def view(mapping: MappedMemory) -> Bytes:
    """Return the mapped memory. The view keeps it mapped."""
    data: Bytes = np.asarray(mapping)
    return data
