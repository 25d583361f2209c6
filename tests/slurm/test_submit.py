"""Runs on a real cluster of four nodes: submitted, finished, interrupted, continued, to the bit as on one machine."""

import json
from pathlib import Path

import pytest

from tests.support.slurm_cluster import SlurmCluster, await_that, losses, show

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "ci" / "tiny.yaml")
SMALL = ("stages.0.tokens=3072", "log.tensorboard=false", "evaluation.samples=2")
EIGHT = ("parallel.data=2", "parallel.pipeline=2", "parallel.tensor=2", "cluster.ranks_per_node=2")

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def submitted(cluster: SlurmCluster, run: Path, *overrides: str) -> str:
    result = cluster.keepwarm("submit", TINY, *SMALL, *overrides, f"output={run}")
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout.strip()


def words(run: Path) -> str:
    return show(sorted((run / "logs").iterdir()))


def on_this_machine(cluster: SlurmCluster, run: Path, *overrides: str) -> list[str]:
    """The same job under `keepwarm train`, on the login node alone."""
    result = cluster.keepwarm("train", TINY, *SMALL, *overrides, f"output={run}", timeout=600)
    assert result.returncode == 0, result.stderr
    return losses(run / "metrics.jsonl")


def happened(run: Path, event: str) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def step_of(run: Path) -> int:
    """The last step in the metrics; 0 before the first."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def test_eight_ranks_on_four_nodes_train_as_on_one_machine(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    job = submitted(cluster, run, *EIGHT)
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *EIGHT)
    assert happened(run, "slurm start")[0]["nodes"] == ["node0", "node1", "node2", "node3"]
    cluster.await_idle()


def test_a_run_told_to_end_is_requeued_and_continues_exactly(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    longer = ("parallel.data=4", "cluster.ranks_per_node=1", "stages.0.tokens=30_720", "checkpoint.every=20")
    job = submitted(cluster, run, *longer)
    await_that(lambda: step_of(run) >= 3, "three steps", 300)
    cluster.login("scancel", "--signal=USR1", job)
    await_that(lambda: bool(happened(run, "requeue")), "the job to be requeued", 120)
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    interrupted = happened(run, "interrupted")[0]["step"]
    began = happened(run, "began")
    assert [(line["source"], line["step"]) for line in began] == [("nothing", 0), ("disk", interrupted)]
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *longer)
