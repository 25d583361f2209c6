"""Drawn faults, two in each run: whatever they are, the run reaches the same bits, and no allocation is left behind."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.test_submit import SLURM, happened, on_this_machine, step_of, submitted, words
from tests.support.runs.slurm_cluster import SlurmCluster, await_that, losses

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1500)]

RUNS = 8
JOB = ("stages.0.tokens=38_400", "snapshot.durable={every: 10}", "cluster.max_restarts=6")
LAST = 100
NODES = ("node0", "node1", "node2", "node3")
_expected: list[list[str]] = []


def crash(cluster: SlurmCluster, run: Path, draw: random.Random) -> str:
    node = draw.choice(NODES)
    cluster.crash(node)
    return f"{node} crashed"


def requeue(cluster: SlurmCluster, run: Path, draw: random.Random) -> str:
    cluster.keepwarm("requeue", str(run), *draw.choice(((), ("--now",))))
    return "requeued"


def cancel(cluster: SlurmCluster, run: Path, draw: random.Random) -> str:
    cluster.keepwarm("cancel", str(run), *draw.choice(((), ("--now",))))
    return "cancelled"


def signal(cluster: SlurmCluster, run: Path, draw: random.Random) -> str:
    """What SLURM does before a time limit."""
    cluster.login("scancel", "--signal=USR1", "--name=slurm")
    return "signalled as before the time limit"


def drain(cluster: SlurmCluster, run: Path, draw: random.Random) -> str:
    node = draw.choice(NODES)
    cluster.login("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    cluster.keepwarm("requeue", str(run))
    return f"{node} drained and the job requeued"


def controller(cluster: SlurmCluster, run: Path, draw: random.Random) -> str:
    cluster.login("pkill", "-x", "slurmctld")
    await_that(lambda: cluster.login("pgrep", "-x", "slurmctld").returncode == 1, "the controller to end")
    cluster.start("slurmctld", "-D", output=cluster.root / "log" / f"controller{draw.random()}")
    return "the controller restarted"


FAULTS: tuple[Callable[[SlurmCluster, Path, random.Random], str], ...] = (
    crash, crash, requeue, cancel, signal, drain, controller,
)  # fmt: skip


def put_right(cluster: SlurmCluster) -> None:
    for name in cluster.stopped():
        cluster.boot(name)
    await_that(lambda: cluster.login("scontrol", "ping").returncode == 0, "the controller")
    cluster.login("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME")


def states_of(cluster: SlurmCluster, *nodes: str) -> str:
    return cluster.login("sinfo", "--noheader", f"--nodes={','.join(nodes)}", "--format=%T").stdout


def active(cluster: SlurmCluster) -> bool:
    states = "--states=RUNNING,COMPLETING,PENDING,CONFIGURING,SUSPENDED"
    listed = cluster.login("squeue", "--noheader", states, "--name=slurm")
    return listed.returncode != 0 or listed.stdout != ""


def await_step(cluster: SlurmCluster, run: Path, step: int) -> None:
    """Until the run has recorded a step; one that a fault has ended is submitted again."""

    def reached() -> bool:
        if happened(run, "finished") or step_of(run) >= step:
            return True
        if not active(cluster):
            again = cluster.keepwarm("submit", str(run), "--resume")
            assert again.returncode == 0 or "is still" in again.stderr or active(cluster), again.stderr + words(run)
        return False

    await_that(reached, f"step {step}", 600)


@pytest.mark.parametrize("seed", range(RUNS))
def test_slurm_drawn_faults_leave_the_same_bits_and_no_allocation(
    cluster: SlurmCluster, folder: Path, seed: int
) -> None:
    draw, run = random.Random(seed), folder / "run"
    if not _expected:
        _expected.append(on_this_machine(cluster, folder / "local", *JOB, job=SLURM))
    submitted(cluster, run, *JOB, job=SLURM)
    told = []
    for step in sorted(draw.sample(range(3, LAST - 20), 2)):
        await_step(cluster, run, step)
        told.append(f"step {step_of(run)}: {draw.choice(FAULTS)(cluster, run, draw)}")
        print(*told, sep="\n", file=sys.stderr)
        if cluster.stopped():
            # It comes back after SLURM has given it up.
            await_that(lambda: "down" in states_of(cluster, *cluster.stopped()), "SLURM to notice", 300)
            put_right(cluster)
    put_right(cluster)
    await_step(cluster, run, LAST)
    await_that(lambda: bool(happened(run, "finished")), "the end of the run", 300)
    await_that(lambda: not active(cluster), f"an empty queue after {told}", 120)
    assert losses(run / "metrics.jsonl") == _expected[0], told
    cluster.await_idle()
