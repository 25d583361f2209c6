"""A run folder on a disk that is full, for a while or to the end."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.test_submit import SLURM, happened, on_this_machine, slot_of, step_of, submitted, words
from tests.support.runs.slurm_cluster import SlurmCluster, await_that, losses

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(900)]

LONG = ("stages.0.tokens=92_160", "snapshot.durable={every: 50}")
NODES = "cluster.slurm.nodelist=node[0-3]"
ALL = ("node0", "node1", "node2", "node3")


@pytest.fixture
def small(cluster: SlurmCluster, folder: Path) -> Iterator[Path]:
    """A run folder, not yet made, on the small disk that the nodes share."""
    run = cluster.root / "small" / folder.name
    yield run
    cluster.login("sh", "-c", f"rm -rf {cluster.root}/small/*")


@pytest.fixture(scope="module")
def undisturbed(_cluster: SlurmCluster) -> list[str]:
    """The losses of the long run on the login node alone."""
    return on_this_machine(_cluster, _cluster.root / "shared" / "undisturbed", *LONG, job=SLURM)


def fill(cluster: SlurmCluster) -> None:
    assert cluster.login("sh", "-c", f"cat /dev/zero > {cluster.root}/small/filler").returncode != 0


def owners(run: Path) -> list[str]:
    """The nodes with a slot."""
    return [node for node in ALL if slot_of(run, node) is not None]


def committed(cluster: SlurmCluster, run: Path, node: str) -> int:
    """The newest step in memory, as the agent of a node knows it."""
    said = cluster.python(node, "keepwarm", "status", str(run), "--json")
    found = json.loads(said.stdout)["committed"] if said.returncode == 0 else None
    return 0 if found is None else int(found[1])


def test_slurm_full_disk_for_a_while_costs_lines_and_no_start(
    cluster: SlurmCluster, small: Path, undisturbed: list[str]
) -> None:
    job = submitted(cluster, small, *LONG, job=SLURM)
    run = cluster.seen(small)
    await_that(lambda: step_of(run) >= 7, "seven steps", 300)
    node = owners(run)[0]
    fill(cluster)
    reached = committed(cluster, small, node) + 20
    await_that(lambda: committed(cluster, small, node) >= reached, "twenty steps on a full disk", 300)
    assert cluster.login("rm", f"{cluster.root}/small/filler").returncode == 0
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert [line["requeues"] for line in happened(run, "batch_started")] == [0]
    assert [line["source"] for line in happened(run, "began")] == ["nothing"]
    kept = losses(run / "metrics.jsonl")
    assert kept[-1] == undisturbed[-1]
    assert set(kept) < set(undisturbed)


def test_slurm_full_disk_and_a_dead_node_cost_a_pause_until_there_is_room(
    cluster: SlurmCluster, small: Path, undisturbed: list[str]
) -> None:
    job = submitted(cluster, small, *LONG, NODES, job=SLURM)
    run = cluster.seen(small)
    await_that(lambda: step_of(run) >= 7, "seven steps", 300)
    spare = next(node for node in ALL if slot_of(run, node) is None)
    holder = owners(run)[-1]  # the first node runs the batch script
    fill(cluster)
    reached = committed(cluster, small, owners(run)[0])
    assert reached >= 7
    cluster.crash(holder)
    # The agents agree on what to restore in a file of the run folder: they wait for room, and keep the memory.
    await_that(lambda: "keepwarm.ft.agent" in "".join(cluster.processes(spare)), "the spare to take the slot", 300)
    assert cluster.login("rm", f"{cluster.root}/small/filler").returncode == 0
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert cluster.login("scontrol", "show", "job", job).stdout.count("Restarts=0") == 1
    assert words(run).count("starting supervisors") == 1
    first, again = happened(run, "began")
    assert (first["source"], again["source"]) == ("nothing", "memory")
    assert int(str(again["step"])) >= reached
    assert losses(run / "metrics.jsonl")[-1] == undisturbed[-1]


def test_slurm_full_disk_to_the_end_fails_after_a_few_starts(cluster: SlurmCluster, small: Path) -> None:
    job = submitted(cluster, small, "cluster.slurm.extra=['--hold']", "cluster.max_restarts=1", job=SLURM)
    fill(cluster)
    assert cluster.login("scontrol", "release", job).returncode == 0
    assert cluster.await_end(job, 600) == "FAILED", words(cluster.seen(small))
    (restarts,) = re.findall(r"Restarts=(\d+)", cluster.login("scontrol", "show", "job", job).stdout)
    assert int(restarts) <= 1
    assert cluster.login("squeue", "--noheader").stdout == ""
    cluster.await_idle()
