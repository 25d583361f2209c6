"""The files of a run folder, and the log line that Megatron-LM's users parse."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from keepwarm import side_writer
from keepwarm.section import Section
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.extensions import METRIC_SINKS
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.sections import LogSpec
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.console import LogLine
from keepwarm.trainer.monitor.metric_sinks import MetricSink, SinkContext, StepMetrics
from keepwarm.trainer.monitor.metrics import Metrics
from tests.support.runs.registered import registered


def at(step: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(step=step, stage="only", loss=loss, lr=1e-3, grad_norm=0.5, tokens=64, step_time_s=0.1)


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_resume_drops_later_and_torn_lines(tmp_path: Path) -> None:
    first = Metrics(tmp_path, LogSpec(tensorboard=False), "run", rank=0, resume_step=None)
    first.evaluation(0, {"en": 3.0})
    for step in (1, 2, 3):
        first.step(at(step))
    first.evaluation(2, {"en": 2.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    second = Metrics(tmp_path, LogSpec(tensorboard=False), "run", rank=0, resume_step=2)
    assert RunFolder(tmp_path).evaluations() == [{"en": 3.0}, {"en": 2.0}]
    second.evaluation(2, {"en": 2.5})
    second.step(at(3))
    second.close()
    assert steps_in(tmp_path) == [0, 1, 2, 2, 3]
    assert RunFolder(tmp_path).evaluations() == [{"en": 3.0}, {"en": 2.5}]


def test_metrics_non_finite_loss_is_null_in_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogSpec(tensorboard=False), "run", rank=0, resume_step=None)
    metrics.step(at(1, math.nan))
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_losses_besides_the_main_one_are_written_by_name(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogSpec(tensorboard=False), "run", rank=0, resume_step=None)
    metrics.step(at(1))
    metrics.step(replace(at(2), auxiliary={"z_loss": 16.0, "balance": math.inf}))
    metrics.close()
    plain, more = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert more.keys() - plain.keys() == {"loss/z_loss", "loss/balance"}
    assert (more["loss/z_loss"], more["loss/balance"]) == (16.0, None)


def test_metrics_tensorboard_events_are_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogSpec(), "run", rank=0, resume_step=None)
    metrics.step(at(1))
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("loss")[0].value == 2.0


def test_metrics_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogSpec(), "run", rank=1, resume_step=None)
    metrics.step(at(1))
    metrics.event(events.Interrupted(step=1))
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_log_line_matches_megatron_grammar() -> None:
    line = LogLine(
        metrics=at(7), last_step=20, consumed_samples=56, global_batch_size=8, tokens_per_s=5120.0, skipped=0
    ).text()
    megatron = (
        r"iteration\s+(\d+)/\s*(\d+) \| consumed samples:\s+(\d+) \| elapsed time per iteration \(ms\): ([\d.]+) \| "
        r"learning rate: ([\d.E+-]+) \| global batch size:\s+(\d+) \| lm loss: ([\d.E+-]+) \| grad norm: ([\d.]+) \|"
    )
    found = re.search(megatron, line)
    assert found is not None
    assert found.groups() == ("7", "20", "56", "100.0", "1.000000E-03", "8", "2.000000E+00", "0.500")


ON_A_TERMINAL = """
import sys
from keepwarm.trainer.monitor.console import LogLine, RunConsole
from keepwarm.trainer.monitor.metric_sinks import StepMetrics
metrics = StepMetrics(step=123_456, stage="a stage with a long name", loss=12.3456, lr=1.234567e-05, grad_norm=1e3,
                      tokens=64, step_time_s=float(sys.argv[1]))
line = LogLine(metrics=metrics, last_step=1_234_567, consumed_samples=10**12, global_batch_size=4096,
               tokens_per_s=float(sys.argv[2]), skipped=3, tflops_per_gpu=400.0, mfu=0.456)
with RunConsole(rank=0, steps=1_234_567, done=0, log_every=1) as console:
    console.step(line)
"""


def on_a_terminal(columns: int, *arguments: str) -> str:
    """What the program prints on a pseudo-terminal of this width."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    environment = {**os.environ, "TERM": "xterm"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ON_A_TERMINAL, *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the kernel's word for the end of a terminal
            while data := os.read(ours, 1 << 16):
                seen += data
        assert process.wait(60) == 0, seen
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


@pytest.mark.parametrize("columns", [80, 150])
@pytest.mark.parametrize(("step_time", "tokens_per_s", "shown", "left"), [
    ("0.5", "123456", "123k", "6d 10h"),
    ("1e-6", "12", "12", "1s"),
    ("0.02", "1.5e9", "1.5G", "6h 10m"),
])  # fmt: skip
def test_log_line_on_a_terminal_is_short_and_shows_what_is_left(
    columns: int, step_time: str, tokens_per_s: str, shown: str, left: str
) -> None:
    output = on_a_terminal(columns, step_time, tokens_per_s)
    expected = f" 123456/1234567 | loss 12.3456 | lr 1.2e-05 | {shown} tok/s | MFU 46% | {left} left"
    assert [line.strip() for line in re.split(r"[\r\n]+", output) if "lr " in line] == [expected.strip()]
    assert len(expected) <= 80
    assert "consumed samples" not in output


class FlakyOptions(Section):
    """Steps at which the sink fails."""

    fails_at: tuple[int, ...] = ()
    fails_to_open: bool = False


class Flaky(MetricSink):
    """Remembers scalars, unless it fails."""

    Options = FlakyOptions
    seen: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def __init__(self, options: FlakyOptions, context: SinkContext) -> None:
        if options.fails_to_open:
            raise ConnectionError("no route")
        self._fails_at = options.fails_at

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step in self._fails_at:
            raise ConnectionError("gone")
        self.seen.append((step, dict(values)))


@pytest.fixture(autouse=True)
def _nothing_lost() -> None:
    side_writer.forget()


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    Flaky.seen.clear()
    with registered(METRIC_SINKS, "flaky", Flaky):
        yield Flaky


def log_spec(sinks: str) -> LogSpec:
    return load_job(Path("ci/tiny"), ["log.tensorboard=false", f"log.sinks={sinks}"]).log


def test_sink_failure_warns_once_and_sink_is_called_again(
    tmp_path: Path, flaky: type[Flaky], caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, log_spec("{flaky: {fails_at: [1, 2]}}"), "run", rank=0, resume_step=None)
    for step in (1, 2, 3):
        metrics.step(at(step))
    metrics.evaluation(3, {"en": 2.0})
    metrics.close()
    assert flaky.seen == [(3, at(3).scalars()), (3, {"eval/en": 2.0})]
    assert steps_in(tmp_path) == [1, 2, 3, 3]
    (failed,) = events.read(tmp_path).of(events.SinkFailed)
    assert (failed.sink, failed.reason) == ("metric sink flaky", "ConnectionError: gone")
    (lost,) = events.read(tmp_path).of(events.OutputLost)
    assert (lost.output, lost.dropped, lost.reason) == ("metric sink flaky", 2, "ConnectionError: gone")
    assert [record.getMessage() for record in caplog.records] == [
        "metric sink flaky: ConnectionError: gone; what cannot be written is dropped, the work goes on"
    ]


def test_sink_that_cannot_be_opened_is_skipped(tmp_path: Path, flaky: type[Flaky]) -> None:
    metrics = Metrics(tmp_path, log_spec("{flaky: {fails_to_open: true}}"), "run", rank=0, resume_step=None)
    metrics.step(at(1))
    metrics.close()
    assert flaky.seen == []
    assert steps_in(tmp_path) == [1]
    assert [event.reason for event in events.read(tmp_path).of(events.SinkFailed)] == ["ConnectionError: no route"]


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        ("{tensorbord: {}}", "log.sinks.tensorbord: unknown metric sink 'tensorbord'; did you mean 'tensorboard'?"),
        ("{wandb: {projekt: a}}", "log.sinks.wandb.projekt: unknown key; did you mean project?"),
        ("{wandb: {}}", "log.sinks.wandb.project: this key is required"),
    ],
)
def test_sink_wrong_name_or_option_is_refused(sinks: str, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        log_spec(sinks)
    assert message in str(refused.value)


def test_sinks_section_overrides_short_forms() -> None:
    assert LogSpec(wandb="p").chosen == {"tensorboard": {}, "wandb": {"project": "p"}}
    sinks = {"wandb": {"project": "q", "tags": ["a"]}}
    assert LogSpec(tensorboard=False, wandb="p", sinks=sinks).chosen == sinks
