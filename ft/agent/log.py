"""Agent log, one JSON object per line."""

import json
import time
from pathlib import Path
from typing import Any

from keepwarm.side_writer import LOG_LIMIT_BYTES, SideWriter


class Journal:
    """Appends to a file that only its owner can read. A folder that is full or gone loses log lines, nothing else."""

    def __init__(self, path: Path, **always: Any) -> None:
        self._always = always
        self._file = SideWriter(path, mode=0o600, limit=LOG_LIMIT_BYTES)

    def write(self, level: str, text: str, **fields: Any) -> None:
        line = {"time": round(time.time(), 3), "level": level, **self._always, "text": text, **fields}
        self._file.write(json.dumps(line, default=str).encode())

    def close(self) -> None:
        self._file.close()
