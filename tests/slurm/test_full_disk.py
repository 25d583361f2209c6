"""A run folder on a disk that is full, for a while or to the end."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.test_submit import SLURM, happened, on_this_machine, slot_of, step_of, submitted, words
from tests.support.runs.slurm_cluster import SlurmCluster, await_that, losses

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def small(cluster: SlurmCluster, folder: Path) -> Iterator[Path]:
    """A run folder, not yet made, on the small disk that the nodes share."""
    run = cluster.root / "small" / folder.name
    yield run
    cluster.login("sh", "-c", f"rm -rf {cluster.root}/small/*")


def fill(cluster: SlurmCluster) -> None:
    assert cluster.login("sh", "-c", f"cat /dev/zero > {cluster.root}/small/filler").returncode != 0


def committed(cluster: SlurmCluster, run: Path) -> int:
    """The newest step in memory, as an agent on one of the nodes knows it."""
    found = [0]
    for node in ("node0", "node1", "node2", "node3"):
        said = cluster.python(node, "keepwarm", "status", str(run), "--json")
        if said.returncode == 0 and (one := json.loads(said.stdout)["committed"]) is not None:
            found.append(one[1])
    return max(found)


def test_slurm_full_disk_for_a_while_costs_lines_and_no_start(cluster: SlurmCluster, folder: Path, small: Path) -> None:
    longer = ("stages.0.tokens=153_600", "snapshot.durable={every: 50}")
    job = submitted(cluster, small, *longer, job=SLURM)
    run = cluster.seen(small)
    await_that(lambda: step_of(run) >= 7, "seven steps", 300)
    fill(cluster)
    reached = committed(cluster, small) + 20
    await_that(lambda: committed(cluster, small) >= reached, "twenty steps on a full disk", 300)
    assert cluster.login("rm", f"{cluster.root}/small/filler").returncode == 0
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert [line["requeues"] for line in happened(run, "batch_started")] == [0]
    assert [line["source"] for line in happened(run, "began")] == ["nothing"]
    local = on_this_machine(cluster, folder / "local", *longer, job=SLURM)
    kept = losses(run / "metrics.jsonl")
    assert kept[-1] == local[-1]
    assert set(kept) < set(local)


def test_slurm_full_disk_and_a_dead_node_cost_no_start(cluster: SlurmCluster, folder: Path, small: Path) -> None:
    longer = ("stages.0.tokens=153_600", "snapshot.durable={every: 50}", "cluster.slurm.nodelist=node[0-3]")
    job = submitted(cluster, small, *longer, job=SLURM)
    run = cluster.seen(small)
    await_that(lambda: step_of(run) >= 7, "seven steps", 300)
    holder = next(node for node in ("node1", "node2", "node3") if slot_of(run, node) is not None)
    fill(cluster)
    reached = committed(cluster, small)
    cluster.crash(holder)
    cluster.boot(holder)
    await_that(lambda: committed(cluster, small) >= reached + 20, "twenty steps on a full disk", 300)
    assert cluster.login("rm", f"{cluster.root}/small/filler").returncode == 0
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert cluster.login("scontrol", "show", "job", job).stdout.count("Restarts=0") == 1
    assert losses(run / "metrics.jsonl")[-1] == on_this_machine(cluster, folder / "local", *longer, job=SLURM)[-1]


def test_slurm_full_disk_to_the_end_fails_after_a_few_starts(cluster: SlurmCluster, small: Path) -> None:
    job = submitted(cluster, small, "cluster.slurm.extra=['--hold']", "cluster.max_restarts=1", job=SLURM)
    fill(cluster)
    assert cluster.login("scontrol", "release", job).returncode == 0
    assert cluster.await_end(job, 600) == "FAILED", words(cluster.seen(small))
    (restarts,) = re.findall(r"Restarts=(\d+)", cluster.login("scontrol", "show", "job", job).stdout)
    assert int(restarts) <= 1
    assert cluster.login("squeue", "--noheader").stdout == ""
    cluster.await_idle()
