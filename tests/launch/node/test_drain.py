"""`keepwarm drain`: a node leaves a run that trains, and no step is lost."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepwarm.launch.cli.main import app
from keepwarm.launch.errors import DrainError
from keepwarm.launch.node import record as node_record
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.goodput import of_run
from tests.launch.node.test_supervision import Cluster, cluster, names
from tests.support.runs import warm
from tests.support.runs.node_fixtures import start, whole
from tests.support.runs.node_run import DEADLINE, Run, assert_equal, assert_nothing_left
from tests.support.runs.stand_ins import alive
from tests.trainer.loop.test_shrink import TWO

__all__ = ["cluster", "start", "whole"]
pytestmark = pytest.mark.timeout(900)


@pytest.mark.dist
def test_drained_node_leaves_to_a_spare_and_no_step_is_lost(whole: Path, start: Callable[..., Run]) -> None:
    """A snapshot is due every five steps: the one with which the node leaves is taken at once."""
    run = start("--nodes", "4", "--spares", "1", "snapshot.every=5")
    run.after(3)
    assert [run.owner(slot).node for slot in range(4)] == ["node-0", "node-1", "node-2", "node-3"]
    done = warm.run(["drain", str(run.folder), "node-1", "--json"], timeout=DEADLINE)
    assert done.returncode == 0, (done.stdout, run.log.read_text())
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["node"], found["slot"], found["taken_by"], found["restart"]) == ("node-1", 1, "node-4", 1)
    recovery = run.recovered(1)
    assert (recovery["level"], recovery["source"], recovery["slots"]) == ("decoded", "memory", [1])
    assert recovery["why"] == "node-1 was drained"
    assert run.owner(1).node == "node-4"
    run.done()
    assert [(event["host"], event["slots"]) for event in run.events("node_drained")] == [("node-1", [1])]
    assert run.events("failure") == []
    ended = {event["node"]: event["code"] for event in run.events("supervisor_ended")}
    assert ended == {f"node-{number}": 0 for number in range(5)}
    assert of_run(run.folder).steps_lost == 0
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.dist
def test_sigterm_of_one_node_leaves_to_a_spare_and_no_step_is_lost(whole: Path, start: Callable[..., Run]) -> None:
    """As a cloud that takes a machine back asks."""
    run = start("--nodes", "4", "--spares", "1", "snapshot.every=5")
    run.after(3)
    os.kill(run.owner(1).supervisor, signal.SIGTERM)
    recovery = run.recovered(1)
    assert (recovery["level"], recovery["source"], recovery["slots"]) == ("decoded", "memory", [1])
    assert run.owner(1).node == "node-4"
    run.done()
    assert [(event["host"], event["slots"]) for event in run.events("node_drained")] == [("node-1", [1])]
    assert run.events("failure") == []
    assert of_run(run.folder).steps_lost == 0
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.dist
def test_drain_of_which_a_node_hears_after_its_workers_have_ended_goes_on(
    whole: Path, start: Callable[..., Run]
) -> None:
    """Ranks agree on the step at which all of them end: the signal of one node reaches the workers of every other."""
    run = start("--nodes", "4", "--spares", "1", "snapshot.every=5", "snapshot.peer_timeout=60")
    run.after(3)
    slow = run.owner(2)
    os.kill(slow.supervisor, signal.SIGSTOP)
    try:
        os.kill(run.owner(1).supervisor, signal.SIGTERM)
        run.until(lambda: not alive(slow.workers[2]), "rank 2 to hand over")
    finally:
        os.kill(slow.supervisor, signal.SIGCONT)
    recovery = run.recovered(1)
    assert (recovery["level"], recovery["source"], recovery["slots"]) == ("decoded", "memory", [1])
    run.done()
    assert of_run(run.folder).steps_lost == 0
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.dist
@pytest.mark.parametrize(
    "disk",
    [
        pytest.param(("snapshot.durable=null", "checkpoint.every=1000"), id="checkpoints of the ranks"),
        pytest.param((), id="agents", marks=pytest.mark.long),
    ],
)
def test_drain_without_a_spare_shrinks_the_run_and_no_step_is_lost(
    start: Callable[..., Run], disk: tuple[str, ...]
) -> None:
    run = start(*TWO, *disk, "cluster.shrink_after=600", "snapshot.every=5", "--nodes", "2")
    run.after(12)
    done = warm.run(["drain", str(run.folder), "node-0"], timeout=DEADLINE)
    assert done.returncode == 0, (done.stdout, run.log.read_text())
    assert "node-0 has left slot 0 to node-1" in done.stdout
    recovery = run.recovered(1)
    assert (recovery["level"], recovery["source"]) == ("resized", "disk")
    (saved,) = run.events("interrupted")
    assert recovery["step"] == saved["step"]
    run.done()
    assert [event["slots"] for event in run.events("resized")] == [1]
    assert run.events("failure") == run.events("memory_not_saved") == []
    assert of_run(run.folder).steps_lost == 0
    assert_nothing_left(run)


def refusal(*arguments: str) -> str:
    error = CliRunner().invoke(app, ["drain", *arguments]).exception
    assert isinstance(error, DrainError), error
    assert error.exit_code == 2
    return str(error)


def test_drain_that_cannot_be_is_refused_with_the_reason(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=1)
    run.running(0)
    folder = str(run.folder)
    nodes = "it has n0 (slot 0), n1 (slot 1), n2 (slot 2); spares: n3"
    assert f"n7: no node of the run has this name or slot; {nodes}" in refusal(folder, "n7")
    (spare,) = (one for one in node_record.read_all(run.folder) if one.node == "n3")
    left = CliRunner().invoke(app, ["drain", folder, "n3"])
    assert left.stdout == "n3 was a spare and has left the run\n"
    run.until(lambda: not alive(spare.supervisor), "the spare to end")
    assert "no spare could take slot 1" in refusal(folder, "1")
    assert [event.host for event in events.read(run.folder).of(events.NodeDrained)] == ["n3"]
    run.end(0)
    assert "no store of this run answers" in refusal(folder, "n1")


def test_drain_without_snapshots_saves_on_disk_and_goes_on(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=1)
    supervisor = run.running(0)[1].supervisor
    late = CliRunner().invoke(app, ["drain", str(run.folder), "n1", "--timeout", "0.5"]).exception
    assert isinstance(late, DrainError)
    assert late.exit_code == 1
    assert "waited 0.5 s for n1 to leave: the ranks have not committed a snapshot" in str(late)
    assert names(run.running(0)) == ["n0", "n1", "n2"]
    (run.folder / "saved").touch()
    found = CliRunner().invoke(app, ["drain", str(run.folder), "1", "--json"])
    assert found.exit_code == 0, found.exception
    assert json.loads(found.stdout)["taken_by"] == "n3"
    assert names(run.running(1)) == ["n0", "n3", "n2"]
    run.until(lambda: not alive(supervisor), "its supervisor to end")
    os.kill(run.pid(0, 1), signal.SIGKILL)
    assert names(run.running(2)) == ["n0", "n3", "n2"]
    run.end(0)
