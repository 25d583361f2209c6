"""A background thread that works ahead of its consumer."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Takes items from an iterator in a background thread, at most `depth` ahead.

    `take` raises the iterator's exceptions, after the items that preceded them. The thread ends with `close`.
    """

    def __init__(self, items: Iterator[T], depth: int, name: str) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[T] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def take(self, timeout: float) -> T:
        """Return the next item.

        Raises:
            TimeoutError: none was ready within `timeout` seconds.
            StopIteration: the iterator has ended.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._failure, timeout):
                raise TimeoutError
            if not self._ready:
                assert self._failure is not None
                raise self._failure
            item = self._ready.popleft()
            self._changed.notify_all()
            return item

    def close(self, timeout: float) -> None:
        """Stop the thread; an item in progress is finished and dropped.

        Raises:
            TimeoutError: the thread did not end within `timeout` seconds.
        """
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError

    def _work(self) -> None:
        try:
            while True:
                item = next(self._items)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
