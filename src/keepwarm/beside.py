"""Work beside the main work of a process, on a thread: storage that does not answer costs a short wait, once."""

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Literal

PATIENCE_S = 2.0
"""How long work is waited for as long as its thread has kept up, in seconds."""
WAITING = 4096
"""Pieces of work that may wait for a storage that does not answer; further ones are dropped."""
Kind = Literal["files", "streams"]
"""Each has a thread of its own: what writes a file may have to say something, and must not wait for itself."""


class Beside:
    """Carries out what it is given, in order. Usually all of it is done when `do` returns.

    Once a piece takes longer than `PATIENCE_S`, it and those after it are not waited for until the thread has caught
    up: a file that a storage takes late is written late.
    """

    def __init__(self, kind: Kind) -> None:
        self._says = kind == "files"  # what is said would go to a stream
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()  # a signal handler may come in between
        self._late: _Job | None = None
        self._thread = threading.Thread(target=self._run, name=f"beside-{kind}", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], object]) -> bool:
        """Have `work` done; return whether it is done now. Raise what it raises, if that is so.

        Raises:
            TimeoutError: too much waits already, and `work` is dropped.
        """
        if threading.current_thread() is self._thread:
            work()
            return True
        if self._jobs.qsize() >= WAITING:
            raise TimeoutError("the storage does not answer")
        job = _Job(work)
        self._jobs.put(job)
        late, self._late = self._late, None
        if late is not None and not late.done.is_set():
            self._late, job.left = job, True
            return False
        if not job.done.wait(PATIENCE_S):
            self._late, job.left = job, True
            self._say(f"a write has not ended in {PATIENCE_S:g} s: what the storage does not take waits, work goes on")
            return False
        if job.error is not None:
            raise job.error
        return True

    def _say(self, text: str) -> None:
        if self._says:
            logging.warning("%s", text)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job.work()
            except Exception as error:
                job.error = error
                if job.left:
                    self._say(f"a late write failed: {type(error).__name__}: {error}")
            job.done.set()


class _Job:
    def __init__(self, work: Callable[[], object]) -> None:
        self.work, self.done = work, threading.Event()
        self.error: Exception | None = None
        self.left = False
        """Whether no one waits for it."""


_threads: dict[tuple[int, Kind], Beside] = {}


def beside(kind: Kind = "files") -> Beside:
    """Return a thread of this process: a fork has its own."""
    key = os.getpid(), kind
    if key not in _threads:
        _threads[key] = Beside(kind)
    return _threads[key]
