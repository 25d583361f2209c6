"""What all tests share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Read by torch when it is imported. Several threads spin against the ranks on a machine of few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

TESTS = Path(__file__).parent
FIRST = ("parallel", "science", "slurm", "drills", "trainer", "launch", "ft")
"""Folders with the longest tests, so that two processes end together."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the markers in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give two processes (`-n 2 --dist loadgroup`) whole files, and all of tests/parallel to one of them.

    Two worlds of eight ranks side by side on two cores spend two thirds of their time in the kernel.
    """
    items.sort(key=lambda item: (*FIRST, _folder(item)).index(_folder(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ranks" if _folder(item) == "parallel" else str(item.path)))


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]


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
