"""Work beside the main work of a process, on one thread: storage that does not answer costs a short wait, once."""

import logging
import os
import queue
import threading
from collections.abc import Callable

PATIENCE_S = 2.0
"""How long work is waited for as long as the thread has kept up, in seconds."""
WAITING = 4096
"""Pieces of work that may wait for a storage that does not answer; further ones are dropped."""


class Beside:
    """Carries out what it is given, in order. Usually all of it is done when `do` returns.

    Once a piece takes longer than `PATIENCE_S`, it and those after it are not waited for until the thread has caught
    up: a file that a storage takes late is written late.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[_Job] = queue.Queue(WAITING)
        self._late: _Job | None = None
        self._thread = threading.Thread(target=self._run, name="beside", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], object]) -> bool:
        """Have `work` done; return whether it is done now. Raise what it raises, if that is so.

        Raises:
            TimeoutError: too much waits already, and `work` is dropped.
        """
        if threading.current_thread() is self._thread:
            work()
            return True
        job = _Job(work)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise TimeoutError("the storage does not answer") from None
        late, self._late = self._late, None
        if late is not None and not late.done.is_set():
            self._late, job.left = job, True
            return False
        if not job.done.wait(PATIENCE_S):
            self._late, job.left = job, True
            logging.warning(
                "a write has not ended in %g s: what the storage does not take waits, the work goes on", PATIENCE_S
            )
            return False
        if job.error is not None:
            raise job.error
        return True

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job.work()
            except Exception as error:
                job.error = error
                if job.left:
                    logging.warning("a late write failed: %s: %s", type(error).__name__, error)
            job.done.set()


class _Job:
    def __init__(self, work: Callable[[], object]) -> None:
        self.work, self.done = work, threading.Event()
        self.error: Exception | None = None
        self.left = False
        """Whether no one waits for it."""


_beside: tuple[int, Beside] | None = None


def beside() -> Beside:
    """Return the thread of this process: a fork has its own."""
    global _beside
    if _beside is None or _beside[0] != os.getpid():
        _beside = os.getpid(), Beside()
    return _beside[1]
