"""Agent log, one JSON object per line."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends to a file that only its owner can read. A full disk loses log lines and has no other effect."""

    def __init__(self, path: Path, **always: Any) -> None:
        self._always = always
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, level: str, text: str, **fields: Any) -> None:
        line = {"time": round(time.time(), 3), "level": level, **self._always, "text": text, **fields}
        try:
            os.write(self._descriptor, json.dumps(line, default=str).encode() + b"\n")
        except OSError:
            return

    def close(self) -> None:
        os.close(self._descriptor)
