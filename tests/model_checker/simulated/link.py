"""Links between agents: two queues that lose everything when the link goes down, each end noticing on its own."""

from collections import deque
from collections.abc import Iterator
from typing import Any

WINDOW = 2
"""Messages on their way below which the sender takes the next bucket from memory."""


class Job:
    """One data chunk on its way to a parity holder: read from memory bucket by bucket, when there is room."""

    def __init__(self, age: tuple[int, int], stripe: int, pieces: Iterator[tuple[Any, Any]]) -> None:
        self.age, self.stripe, self.pieces = age, stripe, pieces


class Direction:
    """One direction of a link: what is on its way, and chunks that wait to be sent."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Any, Any]] = deque()
        """(message, payload) pairs."""
        self.jobs: deque[Job] = deque()

    def clear(self) -> None:
        self.queue.clear()
        self.jobs.clear()


class Link:
    """The link of slots `low` and `high`."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.alive = False
        self.open = {low: False, high: False}
        """Whether an end believes that it has a link."""
        self.session = 0
        self.lossy = False
        """Whether something was dropped on it since it came up."""
        self.to = {low: Direction(), high: Direction()}
        """What is on its way to an end."""

    def other(self, slot: int) -> int:
        return self.high if slot == self.low else self.low

    def down(self) -> None:
        self.alive = False
        for direction in self.to.values():
            direction.clear()
