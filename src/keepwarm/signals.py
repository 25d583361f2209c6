"""Handling of signals that respects what the user has asked for.

`nohup`, `trap '' HUP` and the background jobs of scripts start a process with signals ignored. Those stay ignored.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


def ignored(numbers: Sequence[signal.Signals]) -> frozenset[signal.Signals]:
    """Return those of the signals that this process ignores."""
    return frozenset(number for number in numbers if signal.getsignal(number) == signal.SIG_IGN)


def handle(numbers: Sequence[signal.Signals], handler: Handler) -> None:
    """Install a handler for those of the signals that are not ignored."""
    for number in set(numbers) - ignored(numbers):
        signal.signal(number, handler)


@contextlib.contextmanager
def handled(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Handle those of the signals that are not ignored inside the `with` block."""
    before = {number: signal.signal(number, handler) for number in set(numbers) - ignored(numbers)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def held(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Hold these signals back inside the `with` block: they arrive at its end.

    Around a fork: otherwise a signal to the child, before it has installed handlers of its own, is lost in those of
    its parent. The child has them held back too; it calls `release`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release(numbers: Sequence[signal.Signals]) -> None:
    """Let signals arrive that were held back, now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
