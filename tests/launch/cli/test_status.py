"""keepwarm status from the outside, and what it reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.launch.cli.status import node_states, show, status
from keepwarm.launch.errors import StatusError
from keepwarm.launch.node import record
from keepwarm.launch.node.record import NodeRecord, State
from keepwarm.trainer.job.files import load_job, save_job
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.goodput import Timeline

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has completed two of its steps on one of two nodes."""
    save_job(load_job(ROOT / "configs" / "ci" / "drill.yaml", [f"output={tmp_path}"]), tmp_path / "run.json")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "tokens": 512, "step_time_s": 0.5}\n'
        '{"step": 2, "loss": 2.0, "tokens": 512, "step_time_s": 0.5}\n{"step": 3, "lo'
    )
    timeline = Timeline(tmp_path, rank=0, began=1000.0, restart=False, fresh=True)
    timeline.restored(0)
    timeline.step(1, 0.0)
    timeline.step(2, 0.0)
    timeline.close(2, ended=False)
    record.write(tmp_path, NodeRecord(node="a", host="h", slot=0, supervisor=1, workers={0: 7}, state="running"))
    record.write(tmp_path, NodeRecord(node="b", host="h", slot=None, supervisor=2, state="spare"))
    recovery = events.Recovery(
        level="decoded", why="node b is gone", slots=(1,), source="memory", step=1, bytes_decoded=1, phases={}
    )
    events.append(tmp_path, recovery)
    events.append(tmp_path, events.Requeue(slurm_job="1", why="no node is left", excluded=()))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "of another version", "time": 1.0}\n')
    return tmp_path


def test_status_shows_steps_nodes_and_goodput(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = status(run)
    assert (found["run"], found["step"], found["last_step"]) == ("drill", 2, 24)
    assert [node["state"] for node in found["nodes"]] == ["running", "spare"]
    assert found["goodput"]["steps"] == 2
    assert (found["loss"], found["tokens_per_s"], found["eta_s"]) == (2.0, 1024.0, 11.0)
    assert (found["committed"], found["checkpoint"], found["unsaved_steps"]) == (None, None, 2)
    assert [(one["level"], one["why"]) for one in found["restarts"]] == [
        ("decoded", "node b is gone"),
        (None, "no node is left"),
    ]
    assert found["unknown_events"] == 1
    show(run, as_json=True)
    assert json.loads(capsys.readouterr().out) == found
    show(run, as_json=False)
    shown = capsys.readouterr().out
    assert "drill: 2 of 24 steps" in shown
    assert "loss 2.0000, 1024 tokens/s, 0:00:11 left" in shown
    assert "saved: in memory none known here, on disk nothing" in shown
    assert "(level decoded): node b is gone" in shown
    assert "2 steps kept, 0 lost, 0 restarts" in shown
    assert "start-up" in shown


def test_status_run_that_has_not_begun_has_no_steps(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert (status(run)["step"], status(run)["loss"]) == (0, None)


def test_status_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StatusError, match=r"there is no run here \(run.json is missing\)"):
        status(tmp_path)


def test_status_command_without_a_run_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "keepwarm", "status", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"keepwarm: {tmp_path}: there is no run here")


def test_status_node_that_died_is_lost_and_none_runs_after_the_job() -> None:
    def node(name: str, slot: int | None, restart: int, state: State = "running") -> NodeRecord:
        return NodeRecord(node=name, host="h", slot=slot, supervisor=1, restart=restart, state=state)

    records = [node("n0", 0, 1), node("n1", 1, 0), node("n2", 1, 1), node("n3", None, 0, "spare")]
    states = lambda log, ended=False: [state for _, state in node_states(records, log, ended=ended)]  # noqa: E731
    assert states([]) == ["running", "lost", "running", "spare"]
    lost = events.Failure(node="n0", kind="lost", cause="x", slots=(0,))
    assert states([lost]) == ["lost", "lost", "running", "spare"]
    assert states([lost, events.SupervisorStarted(node="n0", slots=2)]) == ["running", "lost", "running", "spare"]
    elsewhere = events.BatchStarted(slurm_job="7", nodes=("n1", "n2", "n3"), requeues=1)
    assert states([elsewhere]) == ["ended", "lost", "running", "spare"]
    assert states([], ended=True) == ["ended", "lost", "ended", "ended"]
