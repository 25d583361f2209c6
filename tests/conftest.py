"""What all tests share."""

import os
from collections.abc import Iterator

import pytest

# Read by torch when it is imported. Several threads spin against the ranks on a machine of few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _end_rank_processes() -> Iterator[None]:
    """Leave no rank process behind; imports torch only where a test has done so already."""
    yield
    import sys

    if (ranks := sys.modules.get("tests.support.ranks")) is not None:
        ranks.close_pools()
