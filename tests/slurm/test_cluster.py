"""The cluster that the other tests run on is one: separate nodes, a scheduler that sees them die and come back."""

from pathlib import Path

import pytest

from tests.support.runs.slurm_cluster import SlurmCluster, await_that, missing

pytestmark = pytest.mark.slurm


def test_cluster_nodes_are_separate_machines(cluster: SlurmCluster, folder: Path) -> None:
    script = (
        f'mkdir /tmp/mine && echo "$(hostname) $(hostname -i) $$(nproc >/dev/null)" >> {folder}/seen; rmdir /tmp/mine'
    )
    result = cluster.login("timeout", "60", "srun", "--nodes=4", "--overlap", "bash", "-c", script)
    assert result.returncode == 0, result.stderr
    seen = sorted(line.split()[:2] for line in (folder / "seen").read_text().splitlines())
    assert seen == [[f"node{i}", f"10.77.0.{10 + i}"] for i in range(4)]


def test_cluster_crashed_node_loses_its_processes_and_comes_back(cluster: SlurmCluster) -> None:
    victims = cluster.on("node2", "sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!").stdout
    assert victims.strip() in "".join(cluster.processes("node2"))
    cluster.crash("node2")
    assert cluster.login("ping", "-c1", "-W1", "node2").returncode
    cluster.boot("node2")
    await_that(lambda: cluster.login("srun", "--nodelist=node2", "true").returncode == 0, "node2 to take jobs")
    # The step's daemon becomes a zombie for the moment until its node's init collects it.
    await_that(lambda: cluster.processes("node2") == [], "the end of all processes of the step")


def test_cluster_two_at_once_leave_nothing_behind(cluster: SlurmCluster, tmp_path: Path) -> None:
    other = SlurmCluster(tmp_path / "other", nodes=1)
    try:
        other.up()
        assert other.login("srun", "hostname").stdout == "node0\n"
        pids = [machine.pid for machine in other.machines.values()]
    finally:
        other.down()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert cluster.login("srun", "--nodelist=node3", "hostname").stdout == "node3\n"


def test_cluster_missing_slurm_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    reason = missing()
    assert reason is not None
    assert ".ci/run" in reason
