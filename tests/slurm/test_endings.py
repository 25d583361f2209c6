"""How jobs end, as SLURM names it, and what becomes of one whose first node dies: nothing stays allocated."""

import json
import re
import shlex
import time
from pathlib import Path
from typing import cast

import pytest

from tests.slurm.test_submit import SLURM, SMALL, TINY, TWO, happened, on_this_machine, step_of, words
from tests.slurm.test_submit import submitted as submit
from tests.support.runs.slurm_cluster import SlurmCluster, await_that, losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ONE = "cluster.ranks_per_node=1"
LONG = "stages.0.tokens=1_024_000"
FREE_WITHIN_S = 60.0
"""How long nodes may stay allocated without training; on a busy machine not to be taken literally."""


def shown(cluster: SlurmCluster, run: Path) -> dict[str, object]:
    listed = cluster.keepwarm("runs", str(run), "--json")
    assert listed.returncode == 0, listed.stderr
    (row,) = json.loads(listed.stdout)
    assert isinstance(row, dict)
    return row


def holds_nodes(cluster: SlurmCluster) -> bool:
    return bool(cluster.login("squeue", "--noheader", "--states=RUNNING,COMPLETING", "--format=%i").stdout.split())


@pytest.mark.long
def test_slurm_dead_batch_host_run_finishes_on_a_spare_and_frees_its_nodes(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    longer = ("stages.0.tokens=23_040", "snapshot.durable=null")
    job = submit(cluster, run, *longer, 'cluster.slurm.extra=["--nodelist=node[0-3]"]', job=SLURM)
    await_that(lambda: step_of(run) >= 7, "seven steps", 300)
    cluster.crash("node0")
    await_that(lambda: bool(happened(run, "finished")), "the end of the run", 300)
    await_that(lambda: not holds_nodes(cluster), "its nodes to be free", 2 * FREE_WITHIN_S)
    assert {line["node"] for line in happened(run, "failure") if line["kind"] == "lost"} == {"node0"}
    states = {
        one["node"]: one["state"] for one in json.loads(cluster.keepwarm("status", str(run), "--json").stdout)["nodes"]
    }
    assert states["node0"] == "lost"
    (ended,) = happened(run, "batch_ended")
    assert (ended["code"], ended["verdict"]) == (0, "done")
    assert "the first node, which ran the batch script, died" in str(ended["why"])
    cluster.boot("node0")
    assert cluster.await_end(job) == "COMPLETED", words(run)
    assert [line["source"] for line in happened(run, "began")] == ["nothing", "memory"]
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *longer, job=SLURM)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["node", "rank"])
def test_slurm_dead_batch_host_without_a_spare_is_requeued(cluster: SlurmCluster, folder: Path, launcher: str) -> None:
    run = folder / "run"
    longer = ("stages.0.tokens=23_040", "cluster.slurm.spares=0", f"cluster.slurm.launcher={launcher}")
    saved = ("snapshot=off", "checkpoint.every=6") if launcher == "rank" else ()
    job = submit(cluster, run, *longer, *saved, job=SLURM)
    await_that(lambda: step_of(run) >= 13, "two checkpoints", 300)
    cluster.crash("node0")
    await_that(lambda: bool(happened(run, "requeue")), "the requeue", FREE_WITHIN_S)
    await_that(lambda: len(happened(run, "batch_started")) == 2, "the second start", 300)
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert happened(run, "batch_started")[1]["nodes"] == ["node1", "node2", "node3"]
    assert happened(run, "began")[1]["source"] == "disk"
    assert "requeued: the first node, which ran the batch script, died" in words(run)
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *longer, *saved, job=SLURM)


@pytest.mark.long
def test_slurm_dead_batch_host_cancelled_run_is_saved_and_ends(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    nodes = 'cluster.slurm.extra=["--nodelist=node[0-3]"]'
    job = submit(cluster, run, LONG, nodes, job=SLURM)
    await_that(lambda: step_of(run) >= 7, "seven steps", 300)
    cluster.crash("node0")
    await_that(lambda: len(happened(run, "began")) == 2, "the recovery", 300)
    reached = step_of(run) + 3
    await_that(lambda: step_of(run) >= reached, "three more steps", 300)
    assert "once its state is saved" in cluster.keepwarm("cancel", str(run)).stdout
    assert cluster.await_end(job) == "CANCELLED", words(run)
    step = happened(run, "interrupted")[0]["step"]
    assert (run / "checkpoints" / f"iter_{step:07d}").is_dir()
    assert f"cancelled: the state after step {step} is saved" in words(run)
    assert shown(cluster, run)["state"] == "cancelled"


def test_slurm_cancelled_run_ends_as_cancelled_and_its_successor_never_starts(
    cluster: SlurmCluster, folder: Path
) -> None:
    run = folder / "run"
    job = submit(cluster, run, *TWO, LONG)
    after = cluster.login("sbatch", "--parsable", f"--dependency=afterok:{job}", "--wrap=true").stdout.strip()
    held = submit(cluster, folder / "held", *TWO, "cluster.slurm.extra=['--hold']")
    assert cluster.keepwarm("cancel", str(folder / "held")).stdout == f"job {held} will not start\n"
    assert cluster.await_end(held) == "CANCELLED"
    await_that(lambda: step_of(run) >= 2, "two steps", 300)
    said = cluster.keepwarm("cancel", str(run))
    assert "once its state is saved" in said.stdout, said.stderr
    assert cluster.await_end(job) == "CANCELLED", words(run)
    step = happened(run, "interrupted")[0]["step"]
    assert (run / "checkpoints" / f"iter_{step:07d}").is_dir()
    assert f"cancelled: the state after step {step} is saved" in words(run)
    reason = lambda: cluster.login("squeue", "--noheader", f"--jobs={after}", "--format=%r").stdout  # noqa: E731
    await_that(lambda: reason() == "DependencyNeverSatisfied\n", "the successor to be given up")
    assert "no job of this run is pending or running" in cluster.keepwarm("cancel", str(run)).stderr
    assert cluster.keepwarm("watch", str(run)).returncode == 0
    cluster.await_idle()


@pytest.mark.long
def test_slurm_last_task_of_a_sweep_is_requeued_alone(cluster: SlurmCluster, folder: Path) -> None:
    sweep = folder / "two sweeps"
    asked = ("--sweep", "seed=[1, 2]", f"output={sweep}", "stages.0.tokens=51_200")
    result = cluster.keepwarm("submit", TINY, *SMALL, "checkpoint.every=5", *asked)
    assert result.returncode == 0, result.stderr
    array = result.stdout.strip()
    await_that(lambda: step_of(sweep / "0") >= 2 and step_of(sweep / "1") >= 2, "two steps of both", 300)
    said = cluster.keepwarm("requeue", str(sweep / "1"))
    assert said.stdout == f"job {array}_1 is requeued once its state is saved\n", said.stderr
    await_that(lambda: len(happened(sweep / "1", "batch_started")) == 2, "the second start", 300)
    for number in (0, 1):
        assert cluster.await_end(f"{array}_{number}", 600) == "COMPLETED", words(sweep / str(number))
        assert happened(sweep / str(number), "batch_started")[0]["slurm_job"] == f"{array}_{number}"
    assert len(happened(sweep / "0", "batch_started")) == 1
    (requeue,) = happened(sweep / "1", "requeue")
    assert "is saved" in str(requeue["why"])


def test_slurm_forgotten_task_of_a_sweep_hides_nothing_and_starts_again(cluster: SlurmCluster, folder: Path) -> None:
    sweep = folder / "runs of today" / "sweep"
    held = "cluster.slurm.extra=['--hold']"
    result = cluster.keepwarm("submit", TINY, *SMALL, held, "--sweep", "seed=[1, 2, 3]", f"output={sweep}")
    assert result.returncode == 0, result.stderr
    array = result.stdout.strip()
    # SLURM forgets a task that is cancelled before the others have started.
    assert cluster.keepwarm("cancel", str(sweep / "2")).stdout == f"job {array}_2 will not start\n"
    assert cluster.job_state(f"{array}_2") == ""
    listed = cluster.keepwarm("runs", str(folder))
    assert listed.returncode == 0, listed.stderr
    states = [shlex.split(line)[:2] for line in listed.stdout.splitlines()[1:4]]
    assert states == [[f"{sweep}/0", "pending"], [f"{sweep}/1", "pending"], [f"{sweep}/2", "ended"]]
    assert f"'{sweep}/0': pending: JobHeldUser" in listed.stdout
    again = cluster.keepwarm("submit", str(sweep), "--resume")
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.split()) == 1  # that of the third run: the others wait
    assert f"'{sweep}/2': seed=3" in cluster.keepwarm("status", str(sweep)).stdout
    assert cluster.keepwarm("logs", str(sweep)).stdout.count("==> ") == 3
    ended = cluster.keepwarm("cancel", str(sweep))
    assert sorted(ended.stdout.splitlines()) == sorted(
        f"job {job} will not start" for job in (f"{array}_0", f"{array}_1", again.stdout.strip())
    )
    assert cluster.login("squeue", "--noheader").stdout == ""


def test_slurm_allocation_smaller_than_the_layout_fails_with_the_reason(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    cluster.login("scancel", submit(cluster, run, *TWO, "cluster.slurm.begin=now+1hour"))
    smaller = ["--nodes=1", "--begin=now", f"--chdir={run}", str(run / "job.sbatch")]
    job = cluster.login("sbatch", "--parsable", *smaller).stdout.strip()
    assert cluster.await_end(job) == "FAILED", words(run)
    assert words(run).splitlines()[-1].startswith("keepwarm: the layout has 2 nodes, SLURM gave 1")


@pytest.mark.long
def test_slurm_requeues_without_a_step_are_bounded(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    hold = "cluster.slurm.extra=['--hold']"
    job = submit(cluster, run, *TWO, hold, "cluster.max_restarts=1", job=TINY)
    try:
        for name in ("node0", "node1", "node2", "node3"):
            if name != "node0":
                assert cluster.on(name, "mount", "-t", "tmpfs", "tmpfs", str(run)).returncode == 0
        cluster.login("scontrol", "release", job)
        await_that(lambda: bool(happened(run, "requeue")), "a requeue", 100)
        unfit = lambda: re.findall(r"ExcNodeList=(\S+)", cluster.login("scontrol", "show", "job", job).stdout)  # noqa: E731
        await_that(lambda: unfit() == ["node1"], "the unfit node to be excluded")
        cluster.login("scontrol", "update", f"JobId={job}", "ExcNodeList=")
        assert cluster.await_end(job, 300) == "FAILED", words(run)
    finally:
        for name in ("node1", "node2", "node3"):
            cluster.on(name, "umount", str(run))
    assert len(happened(run, "requeue")) == 1
    why = str(happened(run, "batch_ended")[-1]["why"])
    assert why.startswith("2 starts in a row completed no new step (cluster.max_restarts = 1): 1 of 2 nodes are fit")
    assert words(run).splitlines()[-1] == f"keepwarm: {why}"
    assert shown(cluster, run)["why"] == why
    assert why in cluster.keepwarm("status", str(run)).stdout.replace("\n", " ")


@pytest.mark.long
def test_slurm_time_limit_of_a_job_that_may_not_be_requeued_is_a_timeout(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    job = submit(cluster, run, *TWO, LONG, "cluster.slurm.save_before_limit=20")
    assert cluster.login("scontrol", "update", f"JobId={job}", "Requeue=0").returncode == 0
    await_that(lambda: step_of(run) >= 2, "two steps", 300)
    ran = time.time() - cast(float, happened(run, "batch_started")[0]["time"])
    limit = int((ran + 35) // 60) + 1  # SLURM gives its notice 20 s before
    assert cluster.login("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}").returncode == 0
    refused = cluster.keepwarm("requeue", str(run))
    assert refused.returncode == 2
    assert "may not requeue" in refused.stderr
    assert cluster.await_end(job, 300) == "TIMEOUT", words(run)
    step = happened(run, "interrupted")[0]["step"]
    assert (run / "checkpoints" / f"iter_{step:07d}").is_dir()
    assert happened(run, "requeue") == []
    (refusal,) = happened(run, "requeue_refused")
    assert f"not requeued: {refusal['why']}" in words(run)
    assert shown(cluster, run)["why"] == f"not requeued: {refusal['why']}"
