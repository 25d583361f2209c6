"""Show how far a tokenization is: a bar on a terminal, a line now and then in a log. Torch-free."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from keepwarm.text import counted

LOG_INTERVAL = 10.0
"""Seconds between lines where no one watches."""
_NAMED = 3


class Observer:
    """Follows a tokenization, and does nothing by itself."""

    bad: int = 0
    """Number of bad lines that were left out."""

    def __init__(self) -> None:
        self.examples: list[str] = []
        """What is wrong with the first of them."""

    def read(self, count: int) -> None:
        """Called when the documents of `count` more bytes of input are tokenized."""

    def merged(self, parts: int, of: int) -> None:
        """Called for every part that is merged into the output."""

    def left_out(self, count: int, examples: list[str]) -> None:
        """Called when a part had bad lines."""
        self.bad += count
        self.examples += examples[: _NAMED - len(self.examples)]

    def report(self) -> None:
        """Say on stderr what was left out, if anything was."""
        if self.bad:
            _write(f"left out: {counted(self.bad, 'bad line')}, such as: {'; '.join(self.examples)}")


class LogObserver(Observer):
    """Writes a line to stderr every 10 seconds."""

    def __init__(self, what: str, total: int, interval: float = LOG_INTERVAL) -> None:
        super().__init__()
        self._what, self._total, self._done = what, total, 0
        self._interval = interval
        self._started = self._written = time.monotonic()

    def read(self, count: int) -> None:
        self._done += count
        passed = time.monotonic() - self._started
        rate = self._done / passed if passed else 0.0
        left = f", about {(self._total - self._done) / rate:,.0f} s left" if rate and self._total else ""
        self._say(f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB read, {rate / 1e6:.1f} MB/s{left}")

    def merged(self, parts: int, of: int) -> None:
        self._say(f"{parts:,} of {of:,} parts merged")

    def _say(self, text: str) -> None:
        if time.monotonic() - self._written < self._interval:
            return
        self._written = time.monotonic()
        _write(f"{self._what}: {text}")


class BarObserver(Observer):
    """Draws a bar on a terminal; a context manager."""

    def __init__(self, total: int, console: Console) -> None:
        super().__init__()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self._task = self._progress.add_task("tokenize", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def read(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def merged(self, parts: int, of: int) -> None:
        self._progress.update(self._task, description=f"merge {parts:,}/{of:,}")


@contextmanager
def observer(what: str, total: int) -> Iterator[Observer]:
    """Yield the observer that fits this process's stderr; `total` is the number of input bytes on disk."""
    console = Console(stderr=True)
    if console.is_terminal:
        with BarObserver(total, console) as bar:
            yield bar
    else:
        yield LogObserver(what, total)


def input_bytes(inputs: Sequence[Path]) -> int:
    """Return the size on disk of those inputs that exist."""
    return sum(path.stat().st_size for path in inputs if path.is_file())


def _write(text: str) -> None:
    # A log that is closed or full never ends the work that it tells of.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)
