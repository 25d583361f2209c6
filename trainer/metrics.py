"""What a run leaves for machines: metrics.jsonl, events.jsonl, TensorBoard events, Weights & Biases."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer import events
from trainer.errors import SpecError
from trainer.spec_sections import LogSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl; a value that is not finite becomes null. Equal runs differ in `step_time_s` only."""

    step: int
    """Completed steps, this one included."""
    stage: str
    loss: float
    """Nats per unmasked target."""
    lr: float
    grad_norm: float
    tokens: int
    """Unmasked targets of this step."""
    step_time_s: float


class MetricSink(Protocol):
    """Somewhere scalars go, by step."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes one run folder's metrics. On ranks other than 0 every method does nothing."""

    def __init__(self, folder: Path, spec: LogSpec, name: str, *, rank: int, resume_step: int | None) -> None:
        """Open the files; a resumed run first drops the lines of steps after `resume_step`."""
        self._active = rank == 0
        self._sinks: list[MetricSink] = []
        if not self._active:
            return
        path = folder / "metrics.jsonl"
        if resume_step is not None:
            drop_after(path, resume_step)
        self._steps = path.open("a", encoding="utf-8", buffering=1)
        self._folder = folder
        if spec.tensorboard:
            self._sinks.append(TensorBoard(folder / "tensorboard", resume_step))
        if spec.wandb:
            self._sinks.append(WeightsAndBiases(spec.wandb, name, folder))

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        if not self._active:
            return
        values = {key: value for key, value in asdict(metrics).items() if isinstance(value, float)}
        unknown = {key: None for key, value in values.items() if not math.isfinite(value)}
        self._steps.write(json.dumps(asdict(metrics) | unknown) + "\n")
        for sink in self._sinks:
            sink.scalars(metrics.step, values)

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Record the validation loss of every domain after `step` completed steps."""
        if not self._active:
            return
        self._steps.write(json.dumps({"step": step, "eval": losses}) + "\n")
        for sink in self._sinks:
            sink.scalars(step, {f"eval/{domain}": loss for domain, loss in losses.items()})

    def event(self, kind: str, **values: Any) -> None:
        """Record something that happened, with the time of day."""
        if self._active:
            events.append(self._folder, kind, **values)

    def close(self) -> None:
        """Flush and close every file."""
        if not self._active:
            return
        for sink in self._sinks:
            sink.close()
        self._steps.close()


def drop_after(path: Path, step: int) -> None:
    """Rewrite a metrics file as it was right after `step`, before its evaluation, and without a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] < step or (record["step"] == step and "eval" not in record):
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def evaluations(path: Path) -> list[dict[str, float]]:
    """Validation losses by domain, in the order in which they were recorded."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [record["eval"] for record in records if "eval" in record]


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run; offline mode and credentials come from its own environment variables."""

    def __init__(self, project: str, name: str, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise SpecError("log.wandb is set, but wandb is missing: pip install 'keepwarm[wandb]'") from error
        self._run = wandb.init(project=project, name=name, dir=str(folder), resume="allow")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
