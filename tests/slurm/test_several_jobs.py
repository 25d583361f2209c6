"""Several jobs at once: chains of the same name, and an array in which some runs fail."""

import json
import re
from pathlib import Path

import pytest

from tests.slurm.test_submit import SMALL, TINY, happened, words
from tests.support.runs.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_chains_of_the_same_name_do_not_wait_for_each_other(cluster: SlurmCluster, folder: Path) -> None:
    chains = []
    for name in ("first", "second"):
        waiting = ("--chain", "2", "cluster.slurm.begin=now+1hour", "cluster.slurm.job_name=same")
        said = cluster.keepwarm("submit", TINY, *SMALL, *waiting, f"output={folder / name}")
        assert said.returncode == 0, said.stderr
        chains.append(json.loads((folder / name / "submission.json").read_text())["jobs"])
    numbers = [int(job) for chain in chains for job in chain]
    assert numbers == list(range(numbers[0], numbers[0] + 4))  # no allocation in between, as to try a node
    for first, second in chains:
        for job, waits_for in ((first, []), (second, [first])):
            shown = cluster.login("scontrol", "show", "job", job).stdout
            assert "JobName=same" in shown
            assert re.findall(r"\bDependency=\w+:(\d+)", shown) == waits_for


@pytest.mark.long
def test_slurm_array_of_eight_with_failures_in_three_finishes_when_it_is_resumed(
    cluster: SlurmCluster, folder: Path
) -> None:
    sweep = folder / "sweep"
    bad = """cluster.slurm.setup=['case "$SLURM_ARRAY_TASK_ID" in 1|4|6) exit 9;; esac']"""
    seeds = ("--sweep", "seed=[0, 1, 2, 3, 4, 5, 6, 7]", "--max-parallel", "4")
    said = cluster.keepwarm("submit", TINY, *SMALL, bad, *seeds, f"output={sweep}")
    assert said.returncode == 0, said.stderr
    array = said.stdout.strip()
    failed = (1, 4, 6)
    for number in range(8):
        expected = "FAILED" if number in failed else "COMPLETED"
        assert cluster.await_end(f"{array}_{number}", 600) == expected, words(sweep / str(number))
    rows = {Path(row["folder"]).name: row for row in json.loads(cluster.keepwarm("runs", str(sweep), "--json").stdout)}
    assert {int(name) for name, row in rows.items() if row["state"] == "failed"} == {*failed}
    assert {rows[str(number)]["job"]["exit_code"] for number in failed} == {9}
    assert cluster.keepwarm("watch", str(sweep)).returncode == 1
    again = cluster.keepwarm("submit", str(sweep), "--resume")
    assert again.returncode == 0, again.stderr
    jobs = again.stdout.split()
    assert len(jobs) == 3
    for job, number in zip(jobs, failed, strict=True):
        assert cluster.await_end(job, 600) == "COMPLETED", words(sweep / str(number))
    assert [len(happened(sweep / str(number), "batch_started")) for number in range(8)] == [1] * 8
    assert cluster.keepwarm("watch", str(sweep)).returncode == 0
    assert "each run of this sweep has finished" in cluster.keepwarm("submit", str(sweep), "--resume").stderr
