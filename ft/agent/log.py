"""Agent log, one JSON object per line."""

import contextlib
import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

from keepwarm.side_writer import LOG_LIMIT_BYTES, SideWriter, lost

WAITING_LINES = 1024
"""Lines that may wait while the folder does not answer; further ones are lost."""
CLOSE_S = 5.0
"""How long an agent that ends waits for its last lines, in seconds."""


class Journal:
    """Appends to a file that only its owner can read, on a thread of its own.

    A folder that is full, gone or does not answer loses log lines, nothing else.
    """

    def __init__(self, path: Path, **always: Any) -> None:
        self._always, self._name, self._path = always, path.name, path
        self._file = SideWriter(path, mode=0o600, limit=LOG_LIMIT_BYTES)
        self._lines: queue.Queue[bytes | None] = queue.Queue(WAITING_LINES)
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, level: str, text: str, **fields: Any) -> None:
        line = {"time": round(time.time(), 3), "level": level, **self._always, "text": text, **fields}
        try:
            self._lines.put_nowait(json.dumps(line, default=str).encode())
        except queue.Full:
            lost(self._name, TimeoutError("the folder does not answer"))

    def close(self) -> None:
        """Wait until the lines are written, at most `CLOSE_S`."""
        end = time.monotonic() + CLOSE_S
        try:
            self._lines.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):
                if not self._path.exists():  # it or its folder was deleted; the old one serves until there is a new one
                    self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    self._file.close()
            self._file.write(line)
        self._file.close()
