"""`keepwarm runs` and `keepwarm logs` on run folders as a run leaves them; tests/slurm ends and requeues real jobs."""

import json
import shlex
from pathlib import Path

import pytest

from keepwarm.launch.batch.jobs import cancel, requeue
from keepwarm.launch.batch.logs import log_file, show_log
from keepwarm.launch.batch.runs import runs_in, show_runs, table
from keepwarm.launch.batch.watch import watch
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.node import record
from keepwarm.launch.node.record import NodeRecord
from keepwarm.launch.run.progress import progress
from keepwarm.launch.run.submission import Submission
from keepwarm.launch.slurm.verdict import Verdict
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.files import load_job, save_job
from keepwarm.trainer.monitor import events

STARTED = events.BatchStarted(slurm_job="12", nodes=("n1",), requeues=0)
TINY = Path(__file__).parents[3] / "configs" / "ci" / "tiny.yaml"


def ended(verdict: Verdict, code: int) -> events.BatchEnded:
    return events.BatchEnded(slurm_job="12", code=code, verdict=verdict, why="x")


def run(folder: Path, steps: int) -> Path:
    folder.mkdir()
    save_job(load_job(TINY, [f"output={folder}", f"name={folder.name}"]), folder / "run.json")
    lines = [json.dumps({"step": 0, "eval": {"en": 5.5}})]
    for step in range(1, steps + 1):
        lines.append(json.dumps({"step": step, "loss": 5.0 - step / 10, "tokens": 512, "step_time_s": 2.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "lo' if steps else "")
    return folder


def test_progress_of_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    done = progress(run(tmp_path / "half", 10))
    assert (done.step, done.last_step, done.loss, done.tokens_per_s, done.eta_s) == (10, 20, 4.0, 256.0, 20.0)
    new = progress(run(tmp_path / "new", 0))
    assert (new.step, new.loss, new.eta_s) == (0, None, None)


def test_runs_are_listed_with_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("a", 0), ("b", 7), ("c", 20)):
        run(tmp_path / name, steps)
    rows = runs_in(tmp_path)
    assert [(row.name, row.state) for row in rows] == [("a", "new"), ("b", "ended"), ("c", "finished")]
    assert [line.split()[5] for line in table(rows)] == ["STEP", "0/20", "7/20", "20/20"]
    show_runs(tmp_path / "b", as_json=True)
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["progress"]["step"], shown["job"]) == ("ended", 7, None)


BROKEN = {
    "empty": ("run.json", b"", "not JSON"),
    "text": ("run.json", b"[1, 2", "not JSON"),
    "binary": ("run.json", b"\xff\xfe", "not UTF-8"),
    "deep": ("run.json", b"[" * 100_000, "not JSON"),
    "foreign": ("run.json", b'{"name": "x", "steps": 5}', "unknown key"),
    "submitted": ("submission.json", b"{", "submission.json: cannot be read"),
}


def test_runs_unreadable_ones_are_shown_with_the_reason_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", 7)
    for name, (file, content, _) in BROKEN.items():
        (run(tmp_path / name, 3) / file).write_bytes(content)
    with (tmp_path / "a" / "metrics.jsonl").open("a") as metrics:
        metrics.write('\n{"step": 8, "loss": 4.0}\n')  # of a version without the other numbers
    rows = runs_in(tmp_path)
    assert {row.name: row.state for row in rows} == {"a": "ended"} | dict.fromkeys(BROKEN, "unreadable")
    lines = list(table(rows))
    for name, (_, _, why) in BROKEN.items():
        (said,) = [line for line in lines if line.startswith(f"{tmp_path / name}: cannot be read: ")]
        assert why in said
    show_runs(tmp_path, as_json=True)
    shown = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert shown["a"]["progress"]["step"] == 7
    assert shown["empty"]["state"] == "unreadable"
    assert "not JSON" in shown["empty"]["error"]


@pytest.mark.parametrize(("file", "content", "why"), [BROKEN["empty"], BROKEN["submitted"]])
def test_watch_ends_when_what_is_left_cannot_be_read(tmp_path: Path, file: str, content: bytes, why: str) -> None:
    (run(tmp_path / "a", 3) / file).write_bytes(content)
    watch(tmp_path, 60.0)


def test_runs_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=str(tmp_path)):
        runs_in(tmp_path)


def test_cancel_run_never_submitted_is_refused(tmp_path: Path) -> None:
    for action in (cancel, requeue):
        with pytest.raises(ClusterError, match="no run was submitted"):
            action(tmp_path, now=True)


def test_log_file_is_the_newest_job_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "a", 1)
    with pytest.raises(OutputError, match="there are: none"):
        log_file(folder, None)
    logs = folder / "logs"
    logs.mkdir()
    (logs / "rank_00000.log").write_text("first\nsecond\nthird\n")
    assert log_file(folder, None).name == "rank_00000.log"
    with pytest.raises(OutputError, match=r"rank_00003\.log; there are: rank_00000\.log"):
        log_file(folder, 3)
    show_log(folder, 0, 2, follow=False)
    assert capsys.readouterr().out == "second\nthird\n"
    Submission(batch_system="slurm", submitted=0.0, resume=False, jobs=("12",)).write(folder)
    (logs / "slurm-12.log").write_text("job\n")
    assert log_file(folder, None).name == "slurm-12.log"


def test_log_file_of_rank_0_is_that_of_its_supervisor(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 1)
    (folder / "logs").mkdir()
    for slot, node in ((1, "n1"), (0, "n2"), (None, "n3")):
        record.write(folder, NodeRecord(node=node, host="h", slot=slot, supervisor=1))
        (folder / "logs" / f"node_{node}.log").touch()
    assert log_file(folder, 0).name == "node_n2.log"


REFUSED = events.RequeueRefused(slurm_job="12", why="Requested operation is disabled")


@pytest.mark.parametrize(
    ("log", "state", "why"),
    [
        ([STARTED, ended("give up", 3)], "failed", "x"),
        ([STARTED, ended("cancel", 130)], "cancelled", "x"),
        ([STARTED, ended("done", 0)], "completed", None),
        ([STARTED, ended("requeue", 130), REFUSED], "ended", "not requeued: Requested operation is disabled"),
        ([STARTED, REFUSED], "ended", "not requeued: Requested operation is disabled"),
        ([STARTED, REFUSED, STARTED], "ended", None),
        # A run that has ended would have been requeued only for its job to end so.
        ([STARTED, ended("done", 0), REFUSED], "completed", None),
        ([STARTED, ended("give up", 3), STARTED], "ended", None),
        ([STARTED], "ended", None),
        ([], "ended", None),
    ],
)
def test_runs_forgotten_job_has_the_end_that_the_run_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[events.Event], state: str, why: str | None
) -> None:
    for name in ("scontrol", "sacct"):
        command = tmp_path / name
        command.write_text("#!/bin/sh\necho 'Invalid job id specified' >&2; exit 1\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    folder = run(tmp_path / "a", 0)
    Submission(batch_system="slurm", submitted=0.0, resume=False, jobs=("12",)).write(folder)
    for event in log:
        events.append(folder, event)
    (row,) = runs_in(folder)
    assert (row.state, row.why) == (state, why)
    assert row.failed == (state == "failed")
    assert watch(folder, 60.0) != row.failed


def test_runs_are_found_three_folders_down_and_not_inside_runs(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d/e f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        run(tmp_path / name, 1)
    (tmp_path / "a" / "parent").mkdir()
    run(tmp_path / "a" / "parent" / "inside", 1)
    assert [row.name for row in runs_in(tmp_path)] == ["a", "c", "e f"]
    assert [shlex.split(line)[0] for line in table(runs_in(tmp_path))] == [
        "RUN", *(str(tmp_path / name) for name in ("a", "b/c", "b/d/e f"))
    ]  # fmt: skip
