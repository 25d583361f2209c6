"""What all tests share."""

import gc
import os
import sys
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from keepwarm.tested import installed, splits_custom_backward
from tests.support.promised import broken_promise, promised

# Read by torch when it is imported. Several threads spin against the ranks on a machine of few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No site file of the machine that the tests run on.
os.environ["KEEPWARM_SITE"] = ""

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

FIRST = ("parallel", "test_lint.py", "test_wheel.py", "science", "slurm", "drills", "trainer", "launch", "ft")
"""Folders with the longest tests, so that two processes end together."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extras", default="dev", help="the extra of pyproject.toml that this environment was made from")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """In CI (`CI=true`), fail what skips for want of an extra that the environment promises."""
    return _kept_promise((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    return _kept_promise((yield), collector.config)


def _kept_promise(report: Any, config: pytest.Config) -> Any:
    if os.environ.get("CI") == "true" and report.skipped and isinstance(report.longrepr, tuple):
        broken = broken_promise(report.longrepr[2], promised(config.getoption("--extras")))
        if broken is not None:
            report.outcome, report.longrepr = "failed", broken
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not splits_custom_backward(installed("torch") or "0"):
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            if item.get_closest_marker("dist") and "zero_bubble" in repr(parameters):
                item.add_marker(pytest.mark.skip(reason="zero bubble needs torch 2.13"))
    items.sort(key=lambda item: (*FIRST, _folder(item.nodeid)).index(_folder(item.nodeid)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Give each of several processes (`-n 2`) whole files, and all of tests/parallel to one of them.

    Two worlds of eight ranks side by side on two cores spend two thirds of their time in the kernel.
    """
    return _ByFile(config, log)


class _ByFile(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return "ranks" if _folder(nodeid) == "parallel" else nodeid.partition("::")[0]


def _folder(nodeid: str) -> str:
    return nodeid.removeprefix("tests/").partition("/")[0]


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
