"""What is meant by a place: a path on this machine, or a URL of any fsspec protocol. Torch-free."""

import re
from pathlib import Path

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::|://)", re.IGNORECASE)


def is_url(where: str | Path) -> bool:
    """Whether fsspec is meant: `s3://bucket/run`, `memory://run`, `file:///run`."""
    return isinstance(where, str) and _URL.match(where) is not None
