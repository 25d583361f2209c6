"""Agent log, one JSON object per line."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends to a file that only its owner can read. A folder that is full or gone loses log lines, nothing else."""

    def __init__(self, path: Path, **always: Any) -> None:
        self._path, self._always = path, always
        self._descriptor = -1

    def write(self, level: str, text: str, **fields: Any) -> None:
        line = {"time": round(time.time(), 3), "level": level, **self._always, "text": text, **fields}
        with contextlib.suppress(OSError):
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.write(self._descriptor, json.dumps(line, default=str).encode() + b"\n")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
