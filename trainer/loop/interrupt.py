"""Signals that request a stop after the current step, with the state saved."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from keepwarm import signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, a regular termination request, and the signal SLURM sends before a time limit."""


class Interrupt:
    """Remembers the first such signal; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator["Interrupt"]:
        """Remember signals inside the `with` block. Those that this process ignores stay ignored."""
        with signals.handled(SIGNALS, self._remember):
            yield self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
