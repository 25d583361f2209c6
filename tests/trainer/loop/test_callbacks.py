"""Loop callbacks of other packages: refused or built from a job, called in order, and what they may change."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from keepwarm.ft.format import publication
from keepwarm.ft.format.reader import read_part
from keepwarm.options import Component
from keepwarm.section import Section
from keepwarm.trainer.errors import SpecError, TrainingStopped
from keepwarm.trainer.job.extensions import CALLBACKS
from keepwarm.trainer.job.files import load_job, shipped_configs
from keepwarm.trainer.loop.callback import Callback, Callbacks, Ending, Run, StepDone
from keepwarm.trainer.loop.session import run_session

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
def registered() -> Iterator[None]:
    components = {"recorder": Recorder, "zeroing": Zeroing, "stranger": Stranger}
    for name, component in components.items():
        CALLBACKS.register(name)(component)
    yield
    for name in components:
        CALLBACKS.unregister(name)


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


@pytest.mark.parametrize("ending", ["finished", "stopped", "halted", "failed"])
def test_callbacks_close_failure_does_not_keep_others_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: Ending
) -> None:
    class Probe(Callback):
        def close(self, run: Run, _: Ending) -> None:
            callbacks = Callbacks([Closing(), Closing("first"), Closing("last")])
            try:
                callbacks.close(run, ending)
            except RuntimeError as error:
                raised.append(str(error))
            closed.extend(one.closed for one in callbacks if isinstance(one, Closing))

    raised: list[str] = []
    closed: list[bool] = []
    CALLBACKS.register("probe")(Probe)
    try:
        with caplog.at_level(logging.WARNING):
            assert train(tmp_path / "run", "callbacks={probe: {}}")
    finally:
        CALLBACKS.unregister("probe")
    assert closed == [True, True, True]
    logged = [record.getMessage() for record in caplog.records if "closing a callback" in record.getMessage()]
    if ending in ("finished", "stopped"):
        assert (raised, logged) == (["last"], [])
    else:
        assert raised == []
        assert logged == [f"closing a callback failed: {text}" for text in ("last", "first")]
