"""Loop callbacks of other packages: refused or built from a job, called in order, and what they may change."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from keepwarm.ft.format import publication
from keepwarm.ft.format.reader import read_part
from keepwarm.options import Component
from keepwarm.section import Section
from keepwarm.trainer.distributed.in_process_restart import RestartRequested
from keepwarm.trainer.errors import SpecError, TrainingStopped
from keepwarm.trainer.job.extensions import CALLBACKS
from keepwarm.trainer.job.files import load_job, shipped_configs
from keepwarm.trainer.loop.callback import Callback, Callbacks, Ending, Run, StepDone
from keepwarm.trainer.loop.session import run_session
from keepwarm.trainer.monitor.goodput import read_marks
from keepwarm.trainer.monitor.watchdog import Watchdog
from tests.support.runs.registered import registered

TINY = shipped_configs() / "ci" / "tiny.yaml"
STEPS = 3


class RecorderOptions(Section):
    """Where the calls are written."""

    path: str
    stop_after: int | None = None


class Recorder(Callback):
    """Writes a line for each call."""

    Options = RecorderOptions

    def on_start(self, run: Run) -> None:
        self._write("on_start", run)

    def before_step(self, run: Run) -> None:
        self._write("before_step", run)

    def before_update(self, run: Run) -> None:
        self._write("before_update", run)

    def after_step(self, run: Run, done: StepDone) -> None:
        self._write("after_step", run)
        if run.state.step == self.options.stop_after:
            run.request_stop("enough")

    def on_evaluation(self, run: Run, losses: Mapping[str, float]) -> None:
        self._write(f"on_evaluation {' '.join(losses)}", run)

    def at_boundary(self, run: Run) -> None:
        self._write("at_boundary", run)

    def close(self, run: Run, ending: Ending) -> None:
        self._write(f"close {ending}", run)

    def _write(self, hook: str, run: Run) -> None:
        with Path(self.options.path).open("a") as file:
            file.write(f"{run.state.step} {hook}\n")


class Zeroing(Callback):
    """Sets the final norm's weights to zero after every step."""

    def after_step(self, run: Run, done: StepDone) -> None:
        with torch.no_grad():
            run.engine.state()["model.final_norm.weight"].local.zero_()


class Stranger(Component):
    """Registered in the wrong group."""


@pytest.fixture(autouse=True)
def components() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, component in {"recorder": Recorder, "zeroing": Zeroing, "stranger": Stranger}.items():
            stack.enter_context(registered(CALLBACKS, name, component))
        yield


def train(folder: Path, *overrides: str) -> bool:
    small = (f"stages.0.tokens={STEPS * 8 * 64}", "evaluation.samples=4", "log.tensorboard=false")
    return run_session(TINY, [*small, f"output={folder}", *overrides], resume=False)


def recording(path: Path, **options: Any) -> str:
    more = "".join(f", {key}: {value}" for key, value in options.items())
    return f"callbacks={{recorder: {{path: {path}{more}}}}}"


def refusal(override: str) -> str:
    with pytest.raises(SpecError) as refused:
        load_job(TINY, [override])
    return str(refused.value)


def test_callbacks_unknown_name_lists_nearest() -> None:
    assert "callbacks.recoder: unknown callback 'recoder'; did you mean 'recorder'?" in refusal(
        "callbacks={recoder: {path: x}}"
    )


def test_callbacks_unknown_option_lists_nearest() -> None:
    assert "callbacks.recorder.stop_aftr: unknown key; did you mean stop_after?" in refusal(
        "callbacks={recorder: {path: x, stop_aftr: 1}}"
    )


def test_callbacks_missing_and_mistyped_options_are_both_named() -> None:
    message = refusal("callbacks={recorder: {stop_after: soon}}")
    assert "callbacks.recorder.path: this key is required" in message
    assert "callbacks.recorder.stop_after: " in message


def test_callbacks_component_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"callbacks\.stranger: Stranger is not a subclass"):
        train(tmp_path / "run", "callbacks={stranger: {}}")


def test_callbacks_hooks_are_called_in_order(tmp_path: Path) -> None:
    assert train(tmp_path / "run", recording(tmp_path / "calls"), "evaluation.every=2")
    evaluated = {2, 3}
    expected = ["0 on_evaluation en de", "0 on_start"]
    for step in range(STEPS):
        expected += [f"{step} before_step", f"{step} before_update", f"{step + 1} after_step"]
        expected += [f"{step + 1} on_evaluation en de"] if step + 1 in evaluated else []
        expected.append(f"{step + 1} at_boundary")
    assert (tmp_path / "calls").read_text().splitlines() == [*expected, f"{STEPS} close finished"]


class Voter(Callback):
    """Has numbers to agree on."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.heard: tuple[int, ...] = ()

    def votes(self, run: Run) -> Sequence[int]:
        return self.numbers

    def agreed(self, run: Run, largest: Sequence[int]) -> None:
        self.heard = tuple(largest)


def test_callbacks_votes_travel_with_one_collective_and_come_back_to_who_gave_them() -> None:
    collectives = []

    class World:
        def largest_each(self, values: Sequence[int]) -> list[int]:
            collectives.append(list(values))
            return [value + 10 for value in values]

    voters = [Voter(1, 2), Callback(), Voter(), Voter(3)]
    assert Callbacks(voters).agree(SimpleNamespace(world=World()), 0) == 10  # type: ignore[arg-type]
    assert collectives == [[0, 1, 2, 3]]
    assert [voter.heard for voter in voters if isinstance(voter, Voter)] == [(11, 12), (), (13,)]


def test_callbacks_request_stop_saves_state_and_stops(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="enough"):
        train(tmp_path / "run", recording(tmp_path / "calls", stop_after=2))
    assert (tmp_path / "calls").read_text().splitlines()[-2:] == ["2 at_boundary", "2 close stopped"]
    newest = publication.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert publication.verify(newest).step == 2


def test_callbacks_change_after_a_step_is_in_its_checkpoint(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "callbacks={zeroing: {}}")
    newest = publication.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    stored = {
        entry.piece.name: b"".join(blocks)
        for part in publication.verify(newest).parts
        for entry, blocks in read_part(newest, part)
    }
    assert not any(stored["model.final_norm.weight"])
    assert any(stored["model.embedding.weight"])


class Closing(Callback):
    """Notes that it was closed, then fails if told to."""

    def __init__(self, error: str | None = None) -> None:
        super().__init__()
        self.error = error
        self.closed = False

    def close(self, run: Run, ending: Ending) -> None:
        self.closed = True
        if self.error is not None:
            raise RuntimeError(self.error)


def test_callbacks_close_failure_does_not_keep_others_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Probe(Callback):
        def close(self, run: Run, ending: Ending) -> None:
            callbacks = Callbacks([Closing(), Closing("first"), Closing("last")])
            with pytest.raises(RuntimeError, match="last"):
                callbacks.close(run, ending)
            closed.extend(one.closed for one in callbacks if isinstance(one, Closing))

    closed: list[bool] = []
    with registered(CALLBACKS, "probe", Probe), caplog.at_level(logging.WARNING):
        assert train(tmp_path / "run", "callbacks={probe: {}}")
    assert closed == [True, True, True]
    logged = [record.getMessage() for record in caplog.records if "closing a callback" in record.getMessage()]
    assert logged == ["closing a callback failed: first"]


class Faulty(Callback):
    """Ends the run after its second step if told how, and fails when it is closed."""

    ends_with: ClassVar[Exception | None] = None
    ended: ClassVar[list[Ending]] = []

    def after_step(self, run: Run, done: StepDone) -> None:
        if run.state.step == 2 and self.ends_with is not None:
            raise self.ends_with

    def close(self, run: Run, ending: Ending) -> None:
        self.ended.append(ending)
        raise RuntimeError("cannot close")


@pytest.mark.parametrize(
    ("ends_with", "ending"),
    [
        (TrainingStopped("enough"), "stopped"),
        (RestartRequested("peers died"), "halted"),
        (ValueError("a defect"), "failed"),
        (None, "finished"),
    ],
    ids=["stopped", "halted", "failed", "finished"],
)
def test_session_close_failure_is_raised_only_without_another_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ends_with: Exception | None,
    ending: Ending,
) -> None:
    monkeypatch.setattr(Faulty, "ends_with", ends_with)
    monkeypatch.setattr(Faulty, "ended", [])
    expected = ends_with or RuntimeError("cannot close")
    with (
        registered(CALLBACKS, "faulty", Faulty),
        caplog.at_level(logging.WARNING),
        pytest.raises(type(expected), match=str(expected)),
    ):
        train(tmp_path / "run", "callbacks={faulty: {}}")
    assert Faulty.ended == [ending]
    logged = [record.getMessage() for record in caplog.records if "leaving the run" in record.getMessage()]
    assert logged == ([] if ends_with is None else ["leaving the run failed: cannot close"])
    marks = [mark.mark for mark in read_marks(tmp_path / "run")]
    assert (marks[-1] == "end") == (ending in ("finished", "stopped"))
    assert (tmp_path / "run" / "goodput.json").exists() == (ending in ("finished", "stopped"))


class StopsAtOnce(Callback):
    """Requests a stop before the first step."""

    def on_start(self, run: Run) -> None:
        run.request_stop("nothing to do")


def test_callbacks_request_stop_at_the_start_saves_the_state(tmp_path: Path) -> None:
    with registered(CALLBACKS, "stops", StopsAtOnce), pytest.raises(TrainingStopped, match="nothing to do"):
        train(tmp_path / "run", "callbacks={stops: {}}")
    newest = publication.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert publication.verify(newest).step == 0


def test_callbacks_watchdog_is_closed_before_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Callback):
        def close(self, run: Run, ending: Ending) -> None:
            order.append("callback")

    order: list[str] = []
    monkeypatch.setattr(Watchdog, "close", lambda self: order.append("watchdog"))
    with registered(CALLBACKS, "slow", Slow):
        assert train(tmp_path / "run", "callbacks={slow: {}}")
    assert order == ["watchdog", "callback"]
