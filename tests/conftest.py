"""What all tests share."""

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest

# Read by torch when it is imported. Several threads spin against the ranks on a machine of few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

LONGEST = ("science", "slurm", "dist")
"""Markers of the tests that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where groups of tests are dealt out to several processes: the longest first, so that none is left at the end.

    A file is a group, but those of `parallel` are one together: two worlds of ranks at once would thrash the cores.
    """
    for item in items:
        ranks = item.path.parent.name == "parallel"
        item.add_marker(pytest.mark.xdist_group("parallel" if ranks else str(item.path)))
    files = {item.path: index for index, item in enumerate(items)}
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONGEST)}
    parallel = {item.path for item in items if item.path.parent.name == "parallel"}
    items.sort(key=lambda item: (item.path not in parallel, item.path not in long, files[item.path]))


@pytest.fixture(scope="session", autouse=True)
def _end_rank_processes() -> Iterator[None]:
    """Leave no rank process behind; imports torch only where a test has done so already."""
    yield
    if (ranks := sys.modules.get("tests.support.ranks")) is not None:
        ranks.close_pools()


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """A process group that a test leaves makes others fail, far from the cause: whoever left it fails instead."""
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test leaves a process group behind")
