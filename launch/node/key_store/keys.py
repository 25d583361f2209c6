"""Keys and values through which the workers of one start find each other, and who waits for which. Pure."""

from collections import deque
from collections.abc import Callable, Collection, Iterable

SIZE_LIMIT = 1 << 32
"""Bytes of all keys and values of a start: more than the addresses of thousands of ranks."""
INTEGERS = range(-(1 << 63), 1 << 63)


class Waiter:
    """A caller that waits until all of some keys are there."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.done, self.missing = done, set[bytes]()


class Keys:
    """What workers have set. Every method that refuses something raises ValueError and changes nothing."""

    def __init__(self, size_limit: int = SIZE_LIMIT) -> None:
        self._limit, self._size = size_limit, 0
        self._values: dict[bytes, bytes] = {}
        self._queues: dict[bytes, deque[bytes]] = {}
        self._waiting: dict[bytes, dict[Waiter, None]] = {}
        self._barriers: dict[bytes, dict[Waiter, None]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def names(self) -> list[bytes]:
        return list(self._values)

    def get(self, key: bytes) -> bytes:
        """Return a value; ValueError if there is none: callers wait before."""
        if key not in self._values:
            raise ValueError(f"there is no key {key[:80]!r}")
        return self._values[key]

    def is_set(self, key: bytes) -> bool:
        """Return whether a key has a value; `has` counts queues too."""
        return key in self._values

    def has(self, keys: Iterable[bytes]) -> bool:
        return all(key in self._values or key in self._queues for key in keys)

    def set(self, key: bytes, value: bytes) -> None:
        old = self._values.get(key)
        self._grow(len(value) - len(old) if old is not None else len(key) + len(value))
        self._values[key] = value
        for waiter in self._waiting.pop(key, {}):
            self._came(waiter, key)

    def compare_set(self, key: bytes, expected: bytes, value: bytes) -> bytes:
        """Set a value where another one is `expected` (none: empty); return what is there, else what was expected."""
        present = self._values.get(key)
        if present == expected or (present is None and not expected):
            self.set(key, value)
            return value
        return expected if present is None else present

    def add(self, key: bytes, amount: int) -> int:
        """Add to a number, which is 0 before it is set."""
        total = int(self._values.get(key, b"0")) + amount
        if total not in INTEGERS:
            raise ValueError(f"key {key[:80]!r} would become {total}")
        self.set(key, b"%d" % total)
        return total

    def append(self, key: bytes, value: bytes) -> None:
        self.set(key, self._values.get(key, b"") + value)

    def delete(self, key: bytes) -> int:
        """Remove a key; return how many were there."""
        value = self._values.pop(key, None)
        if value is None:
            return 0
        self._size -= len(key) + len(value)
        return 1

    # ---- queues

    def push(self, key: bytes, value: bytes) -> None:
        self._grow(len(value))
        self._queues.setdefault(key, deque()).append(value)
        for waiter in list(self._waiting.get(key, {}))[:1]:  # one value is for one
            _leave(self._waiting, key, waiter)
            self._came(waiter, key)

    def pop(self, key: bytes) -> bytes | None:
        """Return the oldest value of a queue; None if it is empty."""
        queue = self._queues.get(key)
        if queue is None:
            return None
        value = queue.popleft()
        self._size -= len(value)
        if not queue:
            del self._queues[key]
        return value

    def length(self, key: bytes) -> int:
        return len(self._queues.get(key, ()))

    # ---- waiting

    def wait(self, keys: Collection[bytes], waiter: Waiter) -> None:
        """Call `waiter.done` once all keys are there, perhaps at once."""
        waiter.missing = {key for key in keys if not self.has([key])}
        for key in waiter.missing:
            self._waiting.setdefault(key, {})[waiter] = None
        if not waiter.missing:
            waiter.done()

    def arrive(self, key: bytes, size: int, waiter: Waiter) -> None:
        """Call `waiter.done` once `size` callers have arrived at a barrier."""
        arrived = self.add(key, 1)
        here = self._barriers.setdefault(key, {})
        here[waiter] = None
        if arrived >= size:
            del self._barriers[key]
            for each in here:
                each.done()

    def cancel(self, waiter: Waiter) -> None:
        """Call `waiter.done` no more."""
        for key in waiter.missing:
            _leave(self._waiting, key, waiter)
        waiter.missing = set()
        for key in list(self._barriers):
            _leave(self._barriers, key, waiter)

    def _came(self, waiter: Waiter, key: bytes) -> None:
        waiter.missing.discard(key)
        if not waiter.missing:
            waiter.done()

    def _grow(self, by: int) -> None:
        if self._size + by > self._limit:
            raise ValueError(f"keys and values of more than {self._limit} bytes")
        self._size += by


def _leave(places: dict[bytes, dict[Waiter, None]], key: bytes, waiter: Waiter) -> None:
    """Take a caller away from those at a key. A key at which no caller is left takes no memory."""
    here = places.get(key, {})
    here.pop(waiter, None)
    if not here:
        places.pop(key, None)
