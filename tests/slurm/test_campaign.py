"""Drawn faults, two moments in each run: whatever they are, the run reaches the same bits and leaves no allocation."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs.slurm_campaign import Campaign, without_faults
from tests.support.runs.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1500)]

RUNS = 8


@pytest.fixture
def run(cluster: SlurmCluster) -> Iterator[Path]:
    """A run folder, not yet made, on the small disk that the nodes share."""
    yield cluster.root / "small" / "campaign"
    cluster.login("sh", "-c", f"rm -rf {cluster.root}/small/*")


@pytest.mark.parametrize("seed", range(RUNS))
def test_slurm_drawn_faults_leave_the_same_bits_and_no_allocation(cluster: SlurmCluster, run: Path, seed: int) -> None:
    campaign = Campaign(cluster, run, seed)
    campaign.play(without_faults(cluster.root, cluster.keepwarm))
