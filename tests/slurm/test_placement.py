"""Failure domains on a cluster whose switches SLURM knows: a whole switch fails, and the run goes on from memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.test_submit import SLURM, happened, slot_of, step_of, submitted, words
from tests.support.runs.slurm_cluster import SlurmCluster, await_that, missing

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(900)]

TREE = "SwitchName=east Nodes=node[0-1]\nSwitchName=west Nodes=node[2-3]\nSwitchName=spine Switches=east,west\n"


@pytest.fixture
def two_switches(tmp_path: Path) -> Iterator[SlurmCluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path / "cluster", options="TopologyPlugin=topology/tree", files={"topology.conf": TREE})
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def test_slurm_switch_that_fails_with_all_of_its_nodes_costs_no_memory(two_switches: SlurmCluster) -> None:
    cluster, run = two_switches, two_switches.root / "shared" / "run"
    pair = ("parallel.data=2", "snapshot.code={data: 1, parity: 1}", "snapshot.durable=null", "cluster.slurm.spares=2")
    longer = ("stages.0.tokens=15_360", "cluster.slurm.failure_domains=topology")
    submitted(cluster, run, *pair, *longer, job=SLURM)
    await_that(lambda: step_of(run) >= 5, "five steps", 300)
    assert "group 0: node0 (east, slot 0), node2 (west, slot 1)" in words(run)
    assert "spares: node1 (east), node3 (west)" in words(run)
    assert "the loss of any one domain leaves the memory whole" in words(run)
    assert [slot_of(run, f"node{number}") for number in range(4)] == [0, None, 1, None]
    for node in ("node2", "node3"):
        cluster.crash(node)
    await_that(lambda: bool(happened(run, "recovery")), "the recovery", 300)
    (recovery,) = happened(run, "recovery")
    assert (recovery["level"], recovery["source"], recovery["slots"]) == ("decoded", "memory", [1]), words(run)
    await_that(lambda: slot_of(run, "node1") == 1, "the spare of the other switch to have the slot")
    await_that(lambda: bool(happened(run, "finished")), "the end of the run", 300)


def test_slurm_spare_of_another_switch_than_the_rest_of_the_group_takes_a_slot(two_switches: SlurmCluster) -> None:
    cluster, run = two_switches, two_switches.root / "shared" / "run"
    pair = ("parallel.data=2", "snapshot.code={data: 1, parity: 1}", "snapshot.durable=null", "cluster.slurm.spares=2")
    longer = ("stages.0.tokens=30_720", "cluster.slurm.failure_domains=topology")
    submitted(cluster, run, *pair, *longer, job=SLURM)
    for lost, step, left in (("node2", 5, "node3"), ("node3", 15, "node1")):
        await_that(lambda: step_of(run) >= step, f"{step} steps", 300)  # noqa: B023
        cluster.crash(lost)
        await_that(lambda: slot_of(run, left) == 1, f"{left} to have the slot of {lost}", 300)  # noqa: B023
    await_that(lambda: bool(happened(run, "finished")), "the end of the run", 300)
    assert [(each["source"], each["slots"]) for each in happened(run, "recovery")] == [("memory", [1])] * 2, words(run)
