"""Signals that request a stop after the current step, with the state saved on disk or handed over in memory."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from keepwarm import signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, a regular termination request, and the signal SLURM sends before a time limit."""


HAND_OVER = signal.SIGUSR2
"""A supervisor asks the ranks to commit the step in memory and to end: another start goes on from there."""
PROTECTS, HANDS_OVER, STOPS = 1, 2, 3
"""How urgent what was asked for is; 0: nothing. `PROTECTS`: memory needs a snapshot, see `Callback.exposed`."""


class HandedOver(Exception):
    """This start is over, and its last step is committed in memory for the next one."""


class Interrupt:
    """Remembers the first such signal; a second SIGINT ends the process at once, whatever it waits for."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._hands_over = False

    @property
    def urgency(self) -> int:
        """What this rank was asked for: `HANDS_OVER`, `STOPS` or 0."""
        return STOPS if self.received is not None else HANDS_OVER if self._hands_over else 0

    @contextlib.contextmanager
    def watching(self) -> Iterator["Interrupt"]:
        """Remember signals inside the `with` block. Those that this process ignores stay ignored."""
        # Outside the block it is ignored: a rank that starts or ends has nothing to hand over.
        before = signal.signal(HAND_OVER, self._hand_over)
        try:
            with signals.handled(SIGNALS, self._remember):
                yield self
        finally:
            signal.signal(HAND_OVER, before)

    def _hand_over(self, number: int, frame: FrameType | None) -> None:
        self._hands_over = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # By the kernel: an exception from here would wait for a collective to return, and get lost in a destructor.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.received = self.received or signal.Signals(number)
