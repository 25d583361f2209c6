"""Virtual time: actions at moments, carried out in order. Nothing waits, and the same run is the same twice."""

import itertools
from collections.abc import Callable
from heapq import heappop, heappush

START = 1000.0
"""The first moment, in seconds: clocks of machines do not begin at 0."""


class Timeline:
    """What is still to happen."""

    def __init__(self) -> None:
        self.now = START
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def clock(self) -> float:
        return self.now

    def after(self, delay: float, action: Callable[[], None]) -> None:
        """Carry out an action in `delay` seconds, after everything that was put at the same moment before."""
        heappush(self._queue, (self.now + delay, next(self._number), action))

    def run(self, done: Callable[[], bool], seconds: float) -> bool:
        """Let time pass until `done`, at most `seconds`. Return whether it was."""
        end, queue = self.now + seconds, self._queue
        while not done():
            if not queue or queue[0][0] > end:
                self.now = end
                return done()
            self.now, _, action = heappop(queue)
            action()
        return True

    def rest(self, seconds: float) -> None:
        """Let time pass."""
        end, queue = self.now + seconds, self._queue
        while queue and queue[0][0] <= end:
            self.now, _, action = heappop(queue)
            action()
        self.now = end
