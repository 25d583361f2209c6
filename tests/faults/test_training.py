"""Every file that a run writes, on a disk that fails: only a state that cannot be saved ends training, and says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.ft.format import publication
from keepwarm.trainer.monitor import events
from tests.support.faulty.io_faults import Fault, Outcome, assert_whole, run
from tests.support.runs import warm
from tests.support.runs.run_contents import steps_of, tensors_of

TINY = Path(__file__).parents[2] / "configs" / "ci" / "tiny.yaml"
STEPS = 4
JOB = (f"stages.0.tokens={STEPS * 8 * 64}", "evaluation.samples=4", "checkpoint.every=2", "model.layers=2")
pytestmark = pytest.mark.timeout(600)


def command(folder: Path, *overrides: str) -> list[str]:
    return ["train", str(TINY), f"output={folder}", *JOB, *overrides]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = warm.run(command(folder), timeout=120)
    assert done.returncode == 0, done.stdout
    return folder


def trained(tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Outcome:
    """A run with a fault that struck, after which everything that there is is whole."""
    outcome = run(command(tmp_path / "run", *overrides), fault, tmp_path, monkeypatch)
    assert outcome.struck, outcome.output
    if (tmp_path / "run").exists():
        assert_whole(tmp_path / "run")
    return outcome


SIDE = {
    "metrics.jsonl": "*/metrics.jsonl",
    "events.jsonl": "*/events.jsonl",
    "goodput.jsonl": "*/goodput.jsonl",
    "goodput.json": "*/.goodput.json.*",
    "tensorboard": "*/tensorboard*",
    "logs": "*/logs*",
    "profile": "*/profile*",
}
"""Files beside the state, as globs."""
ORDINARY = {
    ("metrics.jsonl", "ENOSPC"), ("metrics.jsonl", "short"), ("events.jsonl", "EROFS"), ("goodput.jsonl", "EIO"),
    ("tensorboard", "ENOSPC"), ("logs", "EROFS"),
}  # fmt: skip


def side_cases() -> Iterator[Any]:
    for name in SIDE:
        for kind in ("ENOSPC", "EIO", "EROFS", "short", "slow"):
            yield pytest.param(name, kind, marks=[] if (name, kind) in ORDINARY else pytest.mark.long)


@pytest.mark.parametrize(("name", "kind"), [*side_cases()])
def test_side_file_that_cannot_be_written_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, name: str, kind: str
) -> None:
    profiled = ["profile={start: 1, steps: 1}"] if name == "profile" else []
    outcome = trained(tmp_path, Fault(path=SIDE[name], kind=kind), monkeypatch, *profiled)
    assert outcome.code == 0, outcome.output
    assert tensors_of(tmp_path / "run") == tensors_of(undisturbed)
    if name != "metrics.jsonl" or kind == "slow":
        assert steps_of(tmp_path / "run") == steps_of(undisturbed)
    if kind != "slow":
        assert outcome.output.count("what cannot be written is dropped") in range(1, 4), outcome.output


def test_metrics_are_written_again_once_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    fault = Fault(path=SIDE["metrics.jsonl"], kind="short", calls="write", first=2, last=3)
    outcome = trained(tmp_path, fault, monkeypatch)
    assert outcome.code == 0
    lost = [line for line in steps_of(undisturbed) if line not in steps_of(tmp_path / "run")]
    assert [line["step"] for line in lost] == [1]
    recorded = events.read(tmp_path / "run").of(events.SinkFailed, events.OutputLost)
    assert [type(event).__name__ for event in recorded] == ["SinkFailed", "OutputLost"]
    assert "metrics.jsonl: 1 writes were dropped" in outcome.output


STATE = {
    "part": "*/checkpoints/*rank_*",
    "manifest": "*/checkpoints/*manifest*",
    "folder": "*/checkpoints*",
}
"""Files of the state, as globs."""


def state_cases() -> Iterator[Any]:
    for name in STATE:
        for kind in ("ENOSPC", "EIO", "EROFS", "short"):
            ordinary = (name, kind) in {("part", "short")}
            yield pytest.param(name, kind, marks=[] if ordinary else pytest.mark.long)


@pytest.mark.parametrize(("name", "kind"), [*state_cases()])
def test_state_that_cannot_be_saved_ends_training_after_the_last_step_with_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, name: str, kind: str
) -> None:
    outcome = trained(tmp_path, Fault(path=STATE[name], kind=kind), monkeypatch)
    assert outcome.code == 6, outcome.output
    assert steps_of(tmp_path / "run") == steps_of(undisturbed)
    failed = [event.step for event in events.read(tmp_path / "run").of(events.CheckpointFailed)]
    assert failed == [2, STEPS, STEPS]
    assert "training continues, and the next checkpoint is tried when it is due" in outcome.output
    assert "make room, then continue with --resume" in outcome.output
    assert publication.checkpoints(tmp_path / "run" / "checkpoints") == []
    assert list((tmp_path / "run").glob("checkpoints/tmp-*/*")) == []
    assert "Traceback" not in outcome.output


def test_checkpoint_that_fails_once_is_followed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    fault = Fault(path=STATE["part"], kind="ENOSPC", calls="write", last=1)
    outcome = trained(tmp_path, fault, monkeypatch)
    assert outcome.code == 0, outcome.output
    kept = [path.name for path in publication.checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == [f"iter_{STEPS:07d}"]
    assert tensors_of(tmp_path / "run") == tensors_of(undisturbed)


@pytest.mark.parametrize("kind", ["ENOSPC", pytest.param("EIO", marks=pytest.mark.long)])
def test_checkpoint_is_found_without_the_hint_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, kind: str
) -> None:
    outcome = trained(tmp_path, Fault(path="*/checkpoints/*latest*", kind=kind), monkeypatch)
    assert outcome.code == 0, outcome.output
    assert not (tmp_path / "run" / "checkpoints" / publication.LATEST).exists()
    assert tensors_of(tmp_path / "run") == tensors_of(undisturbed)


@pytest.mark.dist
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_rank_that_cannot_write_its_part_is_named_and_no_other_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    fault = Fault(path="*/checkpoints*", kind="ENOSPC", rank=rank)
    outcome = trained(tmp_path, fault, monkeypatch, "parallel.tensor=2")
    assert outcome.code == 6, outcome.output
    assert f"failed: rank {rank}: [Errno 28]" in outcome.output
    assert [event.step for event in events.read(tmp_path / "run").of(events.CheckpointFailed)] == [2, STEPS, STEPS]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("*run.json*", "ENOSPC"),
        pytest.param("*run.json*", "short", marks=pytest.mark.long),
        ("*/run/data*", "ENOSPC"),
        pytest.param("*/run/data*", "short", marks=pytest.mark.long),
        pytest.param("*/run/data*", "EROFS", marks=pytest.mark.long),
    ],
)
def test_file_needed_before_the_first_step_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: str
) -> None:
    outcome = trained(tmp_path, Fault(path=path, kind=kind), monkeypatch)
    assert outcome.code == 2, outcome.output
    assert "Traceback" not in outcome.output
    assert "No space left" in outcome.output or "Read-only" in outcome.output
    again = warm.run([*command(tmp_path / "run"), "--force"], timeout=120)
    assert again.returncode == 0, again.stdout
