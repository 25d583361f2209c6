"""Runs whose jobs the controller has forgotten: accounting tells how they ended, and their own events without it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.test_submit import submitted, words
from tests.support.runs.slurm_cluster import SlurmCluster, await_that, missing

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A node, and accounting."""
    reason = missing(accounting=True)
    if reason is not None:
        pytest.skip(reason)
    # A short name: paths of sockets have at most 107 bytes.
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=1, accounting=True)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def shown(cluster: SlurmCluster) -> dict[str, tuple[str, int | None]]:
    """State and exit code of each run by the name of its folder."""
    listed = cluster.keepwarm("runs", str(cluster.root / "shared"), "--json")
    assert listed.returncode == 0, listed.stderr
    rows = json.loads(listed.stdout)
    return {Path(row["folder"]).name: (row["state"], row["job"] and row["job"]["exit_code"]) for row in rows}


def stop(cluster: SlurmCluster, daemon: str) -> None:
    assert cluster.login("pkill", "-x", daemon).returncode == 0
    await_that(lambda: cluster.login("pgrep", "-x", daemon).returncode == 1, f"{daemon} to end")


def test_forgotten_jobs_are_told_by_accounting_and_without_it_by_their_events(accounted: SlurmCluster) -> None:
    runs, jobs = accounted.root / "shared" / "runs of today", {}
    ways = {"done": (), "failed": ("cluster.slurm.setup=['exit 3']",), "cancelled": ("cluster.slurm.extra=['--hold']",)}
    for name, keys in ways.items():
        jobs[name] = submitted(accounted, runs / name, "stages.0.tokens=1024", *keys)
    assert accounted.keepwarm("cancel", str(runs / "cancelled")).returncode == 0
    assert accounted.await_end(jobs["done"]) == "COMPLETED", words(runs / "done")
    expected = {"done": "completed", "failed": "failed", "cancelled": "cancelled"}
    await_that(lambda: {name: state for name, (state, _) in shown(accounted).items()} == expected, "the ends")
    known = shown(accounted)

    # A controller that starts without its state has forgotten all jobs.
    stop(accounted, "slurmctld")
    accounted.start("slurmctld", "-D", "-c", output=accounted.root / "log" / "forgetful")
    await_that(lambda: accounted.login("scontrol", "ping").returncode == 0, "the controller")
    assert accounted.job_state(jobs["done"]) == ""
    await_that(lambda: shown(accounted) == known, "accounting to have the ends of all jobs")
    assert f"job {jobs['failed']}: failed" in accounted.keepwarm("status", str(runs / "failed")).stdout
    assert accounted.keepwarm("watch", str(runs)).returncode == 1

    stop(accounted, "slurmdbd")
    # What leaves no event leaves no trace: the last two ended before keepwarm could start in their job.
    untold = {"done": ("completed", None), "failed": ("ended", None), "cancelled": ("ended", None)}
    assert shown(accounted) == untold
