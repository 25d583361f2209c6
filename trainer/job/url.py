"""Tell paths on this machine from URLs of any fsspec protocol. Torch-free."""

import re
from pathlib import Path

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::|://)", re.IGNORECASE)


def is_url(where: str | Path) -> bool:
    """Return whether `where` is an fsspec URL, such as `s3://bucket/run`, `memory://run` or `file:///run`."""
    return isinstance(where, str) and _URL.match(where) is not None
