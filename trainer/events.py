"""`RUN/events.jsonl`: what happened to a run, one JSON object a line; many processes append to it. Torch-free."""

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


def append(folder: Path, event: str, **fields: Any) -> None:
    """Add one line, in one write: lines of several processes do not mix on a local or a POSIX shared file system."""
    line = json.dumps({"time": time.time(), "event": event, **fields}) + "\n"
    descriptor = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
