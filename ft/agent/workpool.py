"""Compute checksums and parity outside the agent's loop, on a few threads that release the GIL.

Work on one piece of memory runs in submission order (a strand). Different pieces run in parallel. Results are returned
through `WorkPool.collect`, in the thread that drives the selector.
"""

import collections
import os
import selectors
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Job = tuple[Callable[[], Any], Callable[[Any], None] | None, Callable[[], None] | None]
"""Work, callback for its result, and cleanup that always runs in the loop, even if the job is dropped."""


class WorkPool:
    """A few threads, strands of ordered work, and an eventfd that wakes the selector."""

    def __init__(self, selector: selectors.BaseSelector, threads: int) -> None:
        self._selector = selector
        self._pool = ThreadPoolExecutor(threads, "agent")
        self._done: collections.deque[tuple[Future[Any], Callable[[Any], None] | None]] = collections.deque()
        self._strands: dict[Hashable, collections.deque[Job]] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = threading.Lock()
        self._closed = False
        selector.register(self._wake, selectors.EVENT_READ, self)

    def run(self, work: Callable[[], Any], then: Callable[[Any], None] | None = None) -> None:
        """Run `work` on a thread, then call `then(result)` in the loop."""
        self._submit(work, then)

    def follow(self, future: "Future[Any]", then: Callable[[Any], None]) -> None:
        """Call `then(result)` in the loop when a future of another pool completes."""
        future.add_done_callback(lambda done: self._finished(done, then))

    def order(
        self, strand: Hashable, work: Callable[[], Any], then: Callable[[Any], None] | None = None,
        always: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Run as `run` does, after earlier work on the same strand. `always()` is called last, even after `drop`."""
        queue = self._strands.setdefault(strand, collections.deque())
        queue.append((work, then, always))
        if len(queue) == 1:
            self._next(strand)

    def busy(self, strand: Hashable) -> bool:
        return strand in self._strands

    def drop(self, wanted: Callable[[Hashable], bool]) -> None:
        """Drop pending work on the strands that `wanted` selects. Running work finishes, its result is ignored."""
        for strand in [strand for strand in self._strands if wanted(strand)]:
            queue = self._strands[strand]
            work, _, always = queue.popleft()
            dropped = [job[2] for job in queue if job[2] is not None]
            queue.clear()
            queue.append((work, None, always))
            for release in dropped:
                self._later(release)

    def ready(self, mask: int) -> None:
        """Handle the wake-up of the selector for finished work."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        self.collect()

    def collect(self) -> None:
        """Deliver finished results. Re-raise exceptions of the work, which are bugs in the agent."""
        while self._done:
            future, then = self._done.popleft()
            result = future.result()
            if then is not None:
                then(result)

    def close(self) -> None:
        """Wait for running work and cancel the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._selector.unregister(self._wake)
        with self._open:  # what other threads finish later is dropped
            self._closed = True
            os.close(self._wake)

    def _submit(self, work: Callable[[], Any], then: Callable[[Any], None] | None) -> None:
        future = self._pool.submit(work)
        future.add_done_callback(lambda done: self._finished(done, then))

    def _later(self, action: Callable[[], None]) -> None:
        """Call `action` from the loop later, not from the current call stack."""
        done: Future[Any] = Future()
        done.set_result(None)
        self._finished(done, lambda _: action())

    def _finished(self, future: "Future[Any]", then: Callable[[Any], None] | None) -> None:
        with self._open:
            if not future.cancelled() and not self._closed:
                self._done.append((future, then))
                os.eventfd_write(self._wake, 1)

    def _next(self, strand: Hashable) -> None:
        queue = self._strands[strand]
        self._submit(queue[0][0], lambda result: self._step(strand, result))

    def _step(self, strand: Hashable, result: Any) -> None:
        queue = self._strands[strand]
        _, then, always = queue.popleft()
        if queue:
            self._next(strand)
        else:
            del self._strands[strand]
        if then is not None:
            then(result)
        if always is not None:
            always()
