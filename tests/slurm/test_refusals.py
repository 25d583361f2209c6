"""What cannot run is refused in one sentence, and nothing is submitted."""

import sys
from pathlib import Path

import pytest

from tests.support.runs.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "ci" / "tiny.yaml")

pytestmark = pytest.mark.slurm


def refusal(cluster: SlurmCluster, run: Path, *overrides: str) -> str:
    before = cluster.login("squeue", "--noheader", "--format=%i %j").stdout
    result = cluster.keepwarm("submit", TINY, f"output={run}", *overrides)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("keepwarm: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert cluster.login("squeue", "--noheader", "--format=%i %j").stdout == before
    assert cluster.login("ls", str(run)).returncode != 0
    return result.stderr


def test_submit_resources_the_cluster_lacks_are_refused(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    assert "no such partition; there are batch, high" in refusal(cluster, run, "cluster.slurm.partition=gpu")
    assert "partition high has 4" in refusal(
        cluster, run, "parallel.data=8", "cluster.ranks_per_node=1", "cluster.slurm.partition=high"
    )
    said = refusal(cluster, run, "cluster.slurm.time=1")
    assert "cluster.slurm.save_before_limit = 120" in said
    assert "before the time limit, which is 60 s" in said
    assert "have none" in refusal(cluster, run, "cluster.slurm.gpus_per_node=1")


def test_submit_folder_invisible_to_nodes_is_refused(cluster: SlurmCluster) -> None:
    said = refusal(cluster, Path("/tmp/run-of-the-login-node"), "--check")
    assert "does not see the run folder" in said
    assert "node0" in said


def test_submit_read_only_folder_is_refused(cluster: SlurmCluster, folder: Path) -> None:
    assert cluster.login("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)).returncode == 0
    try:
        assert "Read-only file system" in refusal(cluster, folder / "run")
    finally:
        cluster.login("umount", str(folder))


def test_check_asks_with_the_environment_and_options_of_the_job(cluster: SlurmCluster, folder: Path) -> None:
    absent = folder / "an environment"
    said = refusal(cluster, folder / "run", "--check", f"cluster.slurm.venv={absent}")
    assert f"{absent}/bin/python is not on the nodes" in said
    own = (f"cluster.slurm.venv={sys.prefix}", "cluster.slurm.extra=['--hold', '--comment=\"of two words\"']")
    job = cluster.keepwarm("submit", TINY, "--check", f"output={folder / 'run'}", *own)
    assert job.returncode == 0, job.stderr
    assert "no node was asked" not in job.stderr
    cluster.login("scancel", job.stdout.strip())
