"""Take the memory of buffers from the system, on several threads, while the agent already answers.

What is written to a buffer meanwhile stays: taking memory changes no byte.
"""

import collections
import os
import threading
from collections.abc import Sequence

from keepwarm.ft.memory.shared_memory import SharedBuffer

PART_BYTES = 64 << 20
"""Bytes that a thread takes at once; a whole number of huge pages."""
MOST_THREADS = 8


class Growth:
    """The memory of some buffers, on its way."""

    def __init__(self, buffers: Sequence[SharedBuffer]) -> None:
        """Begin. `close` before the buffers."""
        self.bytes = 0
        """How much there is so far."""
        self.failure: OSError | None = None
        self._parts = collections.deque(
            (buffer, start, min(start + PART_BYTES, buffer.size))
            for buffer in buffers
            for start in range(0, buffer.size, PART_BYTES)
        )
        self._lock = threading.Lock()
        count = min(MOST_THREADS, len(os.sched_getaffinity(0)), len(self._parts))
        self._threads = [threading.Thread(target=self._run, name="growth", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop, after the parts under way."""
        with self._lock:
            self._parts.clear()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._parts:
                    return
                buffer, start, stop = self._parts.popleft()
            try:
                buffer.take(start, stop)
            except OSError as error:
                self.failure = error
                return
            with self._lock:
                self.bytes += stop - start
