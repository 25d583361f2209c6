"""One real SLURM cluster of four nodes for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs.slurm_cluster import SlurmCluster, missing


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def cluster(_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, idle before and after the test."""
    yield _cluster
    _cluster.login("scancel", "--user=root")
    for name in _cluster.stopped():
        _cluster.boot(name)
    _cluster.await_idle()


@pytest.fixture
def folder(cluster: SlurmCluster, request: pytest.FixtureRequest) -> Path:
    """A folder that all nodes share."""
    path = cluster.root / "shared" / request.node.name.replace("[", "-").rstrip("]")
    path.mkdir()
    return path
