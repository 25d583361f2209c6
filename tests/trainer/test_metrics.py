"""The files of a run folder, and the log line that Megatron-LM's users parse."""

import json
import math
import re
from pathlib import Path

from trainer.console import LogLine
from trainer.metrics import Metrics, StepMetrics, evaluations
from trainer.spec_sections import LogSpec


def at(step: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(step=step, stage="only", loss=loss, lr=1e-3, grad_norm=0.5, tokens=64, step_time_s=0.1)


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    first = Metrics(tmp_path, LogSpec(tensorboard=False), "run", rank=0, resume_step=None)
    first.evaluation(0, {"en": 3.0})
    for step in (1, 2, 3):
        first.step(at(step))
    first.evaluation(2, {"en": 2.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    second = Metrics(tmp_path, LogSpec(tensorboard=False), "run", rank=0, resume_step=2)
    second.step(at(3))
    second.close()
    assert steps_in(tmp_path) == [0, 1, 2, 3]
    assert evaluations(tmp_path / "metrics.jsonl") == [{"en": 3.0}]


def test_a_loss_that_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogSpec(tensorboard=False), "run", rank=0, resume_step=None)
    metrics.step(at(1, math.nan))
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogSpec(), "run", rank=0, resume_step=None)
    metrics.step(at(1))
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("loss")[0].value == 2.0


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogSpec(), "run", rank=1, resume_step=None)
    metrics.step(at(1))
    metrics.event("x")
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_the_log_line_has_megatrons_grammar() -> None:
    line = LogLine(
        metrics=at(7), last_step=20, consumed_samples=56, global_size=8, tokens_per_s=5120.0, skipped=0
    ).text()
    megatron = (
        r"iteration\s+(\d+)/\s*(\d+) \| consumed samples:\s+(\d+) \| elapsed time per iteration \(ms\): ([\d.]+) \| "
        r"learning rate: ([\d.E+-]+) \| global batch size:\s+(\d+) \| lm loss: ([\d.E+-]+) \| grad norm: ([\d.]+) \|"
    )
    found = re.search(megatron, line)
    assert found is not None
    assert found.groups() == ("7", "20", "56", "100.0", "1.000000E-03", "8", "2.000000E+00", "0.500")
