"""What all tests share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _end_rank_processes() -> Iterator[None]:
    """Leave no rank process behind; imports torch only where a test has done so already."""
    yield
    import sys

    if (ranks := sys.modules.get("tests.support.ranks")) is not None:
        ranks.close_pools()
