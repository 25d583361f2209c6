"""Fixtures of tests that do something to a run on four emulated nodes and compare it with one that was left alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.runs import warm
from tests.support.runs.node_run import DEADLINE, Run, command, runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("nodes") / "whole"
    done = warm.run(command(folder, "--nodes", "4"), timeout=DEADLINE)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with runs(tmp_path) as begin:
        yield begin
