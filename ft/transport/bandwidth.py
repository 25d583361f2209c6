"""Bandwidth cap shared by all links of an agent."""

import time
from collections.abc import Callable

TURN = 4 << 20
"""Maximum bytes read or written on one link before the others get their turn."""


class TokenBucket:
    """Bandwidth cap: at most `rate` bytes per second on average and `burst` bytes at once. None: no cap."""

    def __init__(self, rate: float | None, burst: int = TURN, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self._clock = rate, burst, clock
        self._tokens, self._filled = float(burst), clock()

    def available(self) -> int:
        if self.rate is None:
            return TURN
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._filled) * self.rate)
        self._filled = now
        return max(0, int(self._tokens))

    def take(self, size: int) -> None:
        self._tokens -= size

    def wait(self, size: int = 64 << 10) -> float:
        """Return the seconds until `size` bytes are available."""
        if self.rate is None:
            return 0.0
        return max(0.0, (min(size, self.burst) - self.available()) / self.rate)
