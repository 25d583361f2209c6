"""Buffers of anonymous shared memory: held by the keeper, mapped by agent and workers, freed with the last of them.

A buffer is a memfd of fixed size. It is faulted in from the start (the first write to a fresh page costs five times the
copy) and sealed against resizing, so that no process can make another one fault by truncating it. It holds only data;
messages describe its layout. A process writes to a buffer only after being granted it.
"""

import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import AgentError, MemoryTooSmall
from keepwarm.ft.memory.mapping import POPULATE_READ, POPULATE_WRITE, MappedMemory, view

_SO_PEERPIDFD = 77  # Linux 6.5
_CREDENTIALS = struct.Struct("3i")

_EMPTY: Bytes = np.empty(0, np.uint8)


class SharedBuffer:
    """One mapped buffer. `data` is writable memory of `size` bytes; drop every view of it before `close`."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map the memfd `descriptor` and take ownership of it."""
        self.descriptor, self.size = descriptor, size
        actual = os.fstat(descriptor).st_size
        if actual < size:
            os.close(descriptor)
            raise AgentError(f"a buffer of {size} bytes was announced, the memory handed over has {actual}")
        self._map = MappedMemory(descriptor, size) if size else None
        self._faulted = self._new = False
        self.data: Bytes = view(self._map) if self._map is not None else _EMPTY

    def maps(self, descriptor: int, size: int) -> bool:
        """Return whether this is a mapping of `size` bytes of the memfd `descriptor`."""
        mine, other = os.fstat(self.descriptor), os.fstat(descriptor)
        return (mine.st_dev, mine.st_ino, self.size) == (other.st_dev, other.st_ino, size)

    @classmethod
    def of(cls, descriptor: int, size: int) -> "SharedBuffer":
        """Map a memory file; a new one gets `size` zero bytes, with no memory before `take`. Take the descriptor."""
        new = not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        if new:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        buffer = cls(descriptor, size)
        buffer._new = new
        return buffer

    def take(self, start: int, stop: int) -> None:
        """Take the memory of bytes `start` to `stop` from the system, in huge pages if possible. Changes no byte.

        `start` is aligned to huge pages. Raise `OSError` if there is none.
        """
        if self._map is None:
            return
        if self._new:
            self._map.gather(start, stop)
        if not self._map.populate(start, stop, POPULATE_WRITE):  # an old kernel, or no memory
            os.posix_fallocate(self.descriptor, start, stop - start)

    def fault_in(self) -> None:
        """Fault in every page of this mapping for writing, once. Other threads keep running.

        A mapping in another process needs its own call: faulting in is a considerable part of the time a copy takes.
        """
        if self._faulted or self._map is None:
            return
        self._faulted = True
        if not self._map.populate(0, self.size, POPULATE_WRITE):
            pages = self.data[:: mmap.PAGESIZE]
            pages[...] = pages

    def fault_in_to_read(self, start: int, stop: int) -> None:
        """Fault in bytes `start` to `stop` for reading, which is several times cheaper. They must have memory."""
        if not self._faulted and self._map is not None:
            self._map.populate(start - start % mmap.PAGESIZE, stop, POPULATE_READ)

    def lock_pages(self, start: int, stop: int, step: int) -> None:
        """Page-lock bytes `start` to `stop` for GPUs, in ranges of `step` bytes, unless this buffer has been locked.

        The lock ends with `close`, or with the mapping. Raise `PageLockFailed`, with nothing locked.
        """
        if self._map is not None:
            self._map.lock(start, stop, step)

    def unlock_pages(self) -> None:
        """End the lock, if there is one: GPUs can no longer copy to this memory by themselves."""
        if self._map is not None:
            self._map.unlock()

    def close(self) -> None:
        self.unlock_pages()
        # Any remaining view keeps the mapping alive.
        self.data, self._map = _EMPTY, None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def available_memory() -> int:
    """Return the bytes available on this host without swapping: MemAvailable, or what the cgroup limit leaves."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(x for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::"))
        group = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
        while group != group.parent and group.is_relative_to("/sys/fs/cgroup"):
            with contextlib.suppress(OSError, ValueError):
                limit = int((group / "memory.max").read_text())
                free = min(free, limit - int((group / "memory.current").read_text()))
            group = group.parent
    return max(0, free)


def require_memory(parts: Mapping[str, int], reserve: int = 256 << 20) -> None:
    """Raise `MemoryTooSmall`, with the arithmetic, unless the host has room for all `parts` (bytes by purpose)."""
    need, free = sum(parts.values()), available_memory()
    if need + reserve > free:
        terms = " + ".join(f"{_human(size)} {name}" for name, size in parts.items())
        raise MemoryTooSmall(
            f"snapshots need {terms} = {_human(need)} on this node and {_human(reserve)} must stay free, but only "
            f"{_human(free)} of its memory is available: use more nodes, a smaller model per node, a code with less "
            "parity, or `snapshot: off`"
        )


def bucket_sums(data: Bytes, bucket: int) -> tuple[int, ...]:
    """Return the xxh3_64 of every `bucket` bytes of `data`. The last bucket may be shorter."""
    return tuple(xxhash.xxh3_64_intdigest(data[at : at + bucket].data) for at in range(0, len(data), bucket))


class Holder:
    """A process of this node, tracked by a pidfd so that PID reuse cannot confuse it."""

    def __init__(self, connection: socket.socket) -> None:
        """Identify the process at the other end of a Unix socket.

        Raise `AgentError` if it belongs to another user or is gone.
        """
        size = _CREDENTIALS.size
        self.pid, self.uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if self.uid != os.geteuid():
            raise AgentError(f"process {self.pid} belongs to user {self.uid}, this agent to user {os.geteuid()}")
        try:
            self._pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except OSError as error:
                raise AgentError(f"process {self.pid} has gone: {error.strerror}") from error

    @classmethod
    def found(cls, pid: int, started: int) -> "Holder | None":
        """Return the process with this pid that started at `started`, as `started_at` has it; None if it has gone."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        if started_at(pid) != started:
            os.close(pidfd)
            return None
        holder = cls.__new__(cls)
        holder.pid, holder.uid, holder._pidfd = pid, os.geteuid(), pidfd
        return holder

    def fileno(self) -> int:
        """Return the pidfd, which is readable once the process is dead."""
        return self._pidfd

    @property
    def alive(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def kill(self) -> None:
        """Send SIGKILL. The process is dead and its mappings are gone once `fileno` is readable."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def terminate(self) -> None:
        """Ask the process to end, with SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def started_at(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since the machine's start; None if it has gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _human(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
