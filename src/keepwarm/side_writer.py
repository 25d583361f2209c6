"""Writing to the side: logs, metrics, records and terminal output, none of which may end the work that they describe.

What cannot be written is dropped and counted. The first failure of each kind is logged once for each output; every
later write is tried again, so that a disk that has room again is used again.
"""

import contextlib
import errno
import io
import logging
import os
import select
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from keepwarm.beside import beside

PATIENCE_S = 10.0
"""How long text waits for a terminal or pipe that takes nothing, such as a pager that is not scrolled."""
LOG_LIMIT_BYTES = 16 << 20
"""Size at which a log becomes NAME.1, which replaces an earlier one."""
_STREAMS = {1: "stdout", 2: "stderr"}


@dataclass(frozen=True, slots=True)
class Loss:
    """What an output has lost in this process since `forget`."""

    dropped: int
    """Writes: lines, or pieces of terminal output."""
    reason: str
    """Of the newest one."""


_losses: dict[str, Loss] = {}
_told: set[tuple[str, object]] = set()
_lock = threading.Lock()


def losses() -> dict[str, Loss]:
    """Return what was lost so far, by output."""
    with _lock:
        return dict(_losses)


def forget() -> None:
    """Count from zero and report first failures again, as at the start of a session."""
    with _lock:
        _losses.clear()
        _told.clear()


def lost(output: str, error: Exception) -> None:
    """Count a write that failed, and log the first failure of each kind of an output."""
    if reason := _count(output, error):
        logging.warning("%s: %s; what cannot be written is dropped, the work goes on", output, reason)


@contextlib.contextmanager
def attempt(output: str) -> Iterator[None]:
    """Perform a write inside the `with` block that nothing depends on; an OSError ends the block and is counted."""
    try:
        yield
    except OSError as error:
        lost(output, error)


def _count(output: str, error: Exception) -> str:
    """Count a failure; return its description if it is the first of its kind, else an empty text."""
    reason = f"{type(error).__name__}: {error}"
    kind = output, getattr(error, "errno", None) or type(error).__name__
    with _lock:
        before = _losses.get(output, Loss(0, ""))
        _losses[output] = replace(before, dropped=before.dropped + 1, reason=reason)
        first = kind not in _told
        _told.add(kind)
    return reason if first else ""


class SideWriter:
    """Appends whole lines to a file, which is opened at the first one.

    Several processes may append to one file: each line is a single write. A line that the disk took only half of is
    removed again; what a killed process left is ended before the next line, so that readers lose it alone.
    """

    def __init__(self, path: Path, *, mode: int = 0o644, limit: int | None = None, fresh: bool = False) -> None:
        """`limit`: size in bytes at which the file is renamed to NAME.1; `fresh`: discard what the file holds."""
        self._path, self._mode, self._limit, self._fresh = path, mode, limit, fresh
        self._lock = threading.Lock()
        self._descriptor = -1
        self._torn = False
        """Whether the file ends within a line."""

    def write(self, line: bytes) -> bool:
        """Append a line without its newline; return whether it was written."""
        try:
            with self._lock:
                self._append(line + b"\n")
        except OSError as error:
            lost(self._path.name, error)
            return False
        return True

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _append(self, line: bytes) -> None:
        if self._descriptor >= 0 and self._limit is not None and os.fstat(self._descriptor).st_size >= self._limit:
            self._close()
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        if self._descriptor < 0:
            self._open()
        if self._torn:
            line = b"\n" + line
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            self._withdraw(written)
            self._close()
            raise
        self._torn = False

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if self._fresh else 0)
        self._descriptor = os.open(self._path, flags, self._mode)
        self._fresh = False
        size = os.fstat(self._descriptor).st_size
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def _withdraw(self, written: int) -> None:
        """Remove the beginning of a line whose rest cannot be written, unless another process has appended since."""
        if not written:
            return
        with contextlib.suppress(OSError):
            end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            if os.fstat(self._descriptor).st_size == end:
                os.ftruncate(self._descriptor, end - written)


class _Stream(io.FileIO):
    """A standard stream of which no write fails."""

    def __init__(self, descriptor: int, *, patient: bool = False) -> None:
        """`patient`: writes to a file whose storage does not answer wait on a thread, not here."""
        super().__init__(descriptor, "wb", closefd=False)
        self._aside = patient and stat.S_ISREG(os.fstat(descriptor).st_mode)
        if self._aside:
            beside("streams")  # now: what a process says later must not make it grow
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._patience = PATIENCE_S

    def write(self, data: Any) -> int:
        """Write some of the bytes and return their number; bytes that cannot be written count as written."""
        view = memoryview(data).cast("B")
        try:
            if self._aside:
                beside("streams").do(partial(self._write_all, bytes(view)))
                return len(view)
            if not self._poll.poll(1000 * self._patience):
                raise TimeoutError(errno.ETIMEDOUT, f"took nothing for {PATIENCE_S:g} s")
            self._patience = PATIENCE_S
            # So much fits into a pipe that takes anything: the write does not block.
            taken: int | None = super().write(view[: select.PIPE_BUF])
            if taken is None:
                raise BlockingIOError(errno.EAGAIN, "takes nothing")
            return taken
        except OSError as error:
            if isinstance(error, TimeoutError):
                self._patience = 0.0  # the reader has had its chance; the next piece asks only once
            self._drop(error)
            return len(view)

    def _write_all(self, data: bytes) -> None:
        while data:
            data = data[super().write(data) or 0 :]

    def _drop(self, error: OSError) -> None:
        name = _STREAMS[self.fileno()]
        reason = _count(name, error)
        if reason and name == "stdout":
            # Not through `logging`, which may be what writes here.
            with contextlib.suppress(OSError):
                os.write(2, f"{name}: {reason}; what cannot be written is dropped, the work goes on\n".encode())


class _Result(io.FileIO):
    """A stdout whose content is what its program was asked for: the program ends when it cannot be written."""

    def __init__(self) -> None:
        super().__init__(1, "wb", closefd=False)

    def write(self, data: Any) -> int:
        """Write some of the bytes and return their number; exit with code 1 and one sentence if that fails."""
        try:
            return super().write(data) or 0
        except OSError as error:
            # What is still buffered must not fail again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if error.errno != errno.EPIPE:
                os.write(2, f"error: stdout: {error.strerror}: the output is incomplete\n".encode())
            raise SystemExit(1) from None


def end_without_stdout() -> None:
    """Let a failure to write to stdout end this process with one sentence, or without a word if the reader is gone.

    For programs whose result is what they print. A closed stdout leads nowhere.
    """
    _open_closed_descriptors()
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    elif _is_plain(sys.stdout, 1):
        encoding, lines = sys.stdout.encoding, sys.stdout.isatty()
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Result()), encoding, "backslashreplace", line_buffering=lines)


def protect_streams(*descriptors: int, patient: bool = False) -> None:
    """Replace stdout (1) and stderr (2) by streams of which no write fails: not on a full disk, nor in a broken pipe.

    With `patient`, nor does one wait for a storage that does not answer.
    Those that are closed lead nowhere afterwards: the next file that is opened must not become one of them. Streams
    that Python code has redirected stay as they are.
    """
    _open_closed_descriptors()
    for descriptor in descriptors or tuple(_STREAMS):
        name = _STREAMS[descriptor]
        before: TextIO | None = getattr(sys, name)
        if before is None:
            # Closed when Python started; by now the descriptor may be any file.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif _is_plain(before, descriptor):
            with contextlib.suppress(OSError, ValueError):
                before.flush()
            raw = io.BufferedWriter(_Stream(descriptor, patient=patient))
            setattr(sys, name, io.TextIOWrapper(raw, before.encoding, "backslashreplace", line_buffering=True))


def _open_closed_descriptors() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing == descriptor:
                os.set_inheritable(descriptor, True)
            else:
                os.dup2(nothing, descriptor)
                os.close(nothing)


def _is_plain(stream: TextIO, descriptor: int) -> bool:
    """Return whether a stream is Python's own for the descriptor, or one like it."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(getattr(stream.buffer, "raw", None), _Stream):
        return False
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False
