"""Atomic replacement of files: readers see the old content or the new, never half of one. Line files from their end.
Calls with a deadline."""

import contextlib
import fcntl
import os
import queue
import secrets
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")
_BLOCK_BYTES = 64 << 10
READABLE = 0o666
"""Mode of a file that others may read as far as the umask lets them, as `open` makes it."""


def atomic_write(path: Path, content: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Replace `path` with `content`; the rest as `atomic_file`."""
    with atomic_file(path, mode=mode, durable=durable) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int = 0o600, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a temporary sibling `.NAME.PID.RANDOM.tmp` of `path` that is renamed to it when the block ends.

    The temporary file is created with `mode`, less the umask, and is removed if anything fails; `path` is then what
    it was. With `durable` the bytes and the directory entry are flushed to the disk, so that they survive a loss of
    power.

    Raises OSError.
    """
    temporary = _sibling(path)
    try:
        with _new_file(temporary, mode, durable=durable) as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


_locks: set[int] = set()
"""Descriptors of the locks that this process holds, or has inherited by a fork."""


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder. Processes forked meanwhile share it until they end or call `let_go_of_locks`.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _locks.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if handle in _locks:
            _locks.remove(handle)
            os.close(handle)


def let_go_of_locks() -> None:
    """Close inherited locks, in a forked process that outlives the one that took them."""
    while _locks:
        os.close(_locks.pop())


def atomic_create(path: Path, content: bytes, *, mode: int = 0o600) -> bool:
    """Create `path` with `content`, flushed to the disk, unless it exists; return whether this call created it.

    Of several processes, on several nodes too, exactly one creates the file, and readers see all of it or nothing.

    A file that exists needs no room on the disk, and a folder that can be read is enough.

    Raises OSError.
    """
    if os.path.lexists(path):
        return False
    temporary = _sibling(path)
    try:
        with _new_file(temporary, mode, durable=True) as file:
            file.write(content)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, last one first, each with the offset at which it ends: without its newline.

    Only as much is read as is asked for.

    Raises OSError.
    """
    with path.open("rb") as file:
        start = stop = file.seek(0, os.SEEK_END)
        held = b""
        while start > 0:
            size = min(_BLOCK_BYTES, start)
            start = file.seek(start - size)
            first, *whole = (file.read(size) + held).split(b"\n")
            for line in reversed(whole):
                yield stop, line
                stop -= len(line) + 1
            held = first
        yield stop, held


def sync_file(path: Path) -> None:
    """Flush a file that another program or library has written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(folder: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename or a removal in it survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def _new_file(path: Path, mode: int, *, durable: bool) -> Iterator[BinaryIO]:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())


def await_readable(descriptor: int, seconds: float) -> bool:
    """Wait until a descriptor can be read, as that of a process when it has ended; return whether it can.

    `select.select` refuses descriptors beyond 1,023.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


_hanging: list[threading.Thread] = []
"""Calls of `within` that took too long and have not returned yet."""


def within(function: Callable[[], T], seconds: float) -> T | None:
    """Call a function that reads or writes files; return None if it raises OSError or takes longer than `seconds`.

    While such a call hangs, further ones are not made, so that a storage that does not answer costs its wait once.
    """
    _hanging[:] = [thread for thread in _hanging if thread.is_alive()]
    if _hanging:
        return None
    found: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            found.put((function(), None))
        except OSError:
            found.put((None, None))
        except BaseException as error:
            found.put((None, error))

    thread = threading.Thread(target=call, name="files", daemon=True)
    thread.start()
    try:
        result, error = found.get(timeout=seconds)
    except queue.Empty:
        _hanging.append(thread)
        return None
    if error is not None:
        raise error
    return result
