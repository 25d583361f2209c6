"""Metric sinks: destinations of a run's scalars besides metrics.jsonl, one class each. Torch-free to import.

Other packages list their sinks in the entry-point group `keepwarm.metric_sinks`, and a job names them as `log: {sinks:
{NAME: {options}}}`. They are built on rank 0 as `NAME(options, context)` with an instance of their `Options`. Jobs are
also read on machines without torch: do heavy imports inside `__init__`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from keepwarm.options import Component
from keepwarm.section import Section
from keepwarm.trainer.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl; non-finite values become null. Equal runs differ only in `step_time_s`."""

    step: int
    """Completed steps, including this one."""
    stage: str
    loss: float
    """Nats per unmasked target."""
    lr: float
    grad_norm: float
    tokens: int
    """Unmasked targets of this step."""
    step_time_s: float
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    """Unweighted losses other than the main one, by name, per unmasked target; written as `loss/NAME`."""

    def record(self) -> dict[str, Any]:
        """Return all values by name, as in a line of metrics.jsonl."""
        values = asdict(self)
        return values | {f"loss/{name}": loss for name, loss in values.pop("auxiliary").items()}

    def scalars(self) -> dict[str, float]:
        """Return the values to plot."""
        return {key: value for key, value in self.record().items() if isinstance(value, float)}


@dataclass(frozen=True, kw_only=True)
class SinkContext:
    """The run that a sink records."""

    folder: Path
    """The run folder; it exists."""
    run: str
    """Name of the job."""
    resume_step: int | None
    """The run continues after this step, and records of later steps are void; None: a fresh run."""


class MetricSink(Component):
    """Base of all metric sinks. Used on rank 0 only, from one thread: a call delays the step, for two seconds at most.

    An exception does not stop training: the first one of a sink is reported as a warning and the event `sink_failed`,
    and the sink is called again at the next step.
    """

    def __init__(self, options: Any, context: SinkContext) -> None:
        """Open the destination. Raise SpecError if the job must be changed first; any other error disables the sink."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values by name after `step` completed steps; they may be infinite or NaN."""
        raise NotImplementedError

    def step(self, metrics: StepMetrics) -> None:
        """Record a step."""
        self.scalars(metrics.step, metrics.scalars())

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record the validation loss of every domain after `step` completed steps."""
        self.scalars(step, {f"eval/{domain}": loss for domain, loss in losses.items()})

    def close(self) -> None:
        """Flush and close; called once."""


class TensorBoardOptions(Section):
    """TensorBoard event files in OUTPUT/tensorboard."""

    flush_seconds: PositiveInt = Field(120, description="maximum seconds before events are written to disk")


class TensorBoard(MetricSink):
    """TensorBoard event files."""

    Options = TensorBoardOptions

    def __init__(self, options: TensorBoardOptions, context: SinkContext) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(context.folder / "tensorboard")
        purge = None if context.resume_step is None else context.resume_step + 1
        self._open = partial(SummaryWriter, folder, flush_secs=options.flush_seconds)
        self._writer: SummaryWriter | None = self._open(purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open()
        try:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
        except OSError:
            # Its thread has ended with the first failure: only another writer, with another file, can write again.
            self._writer = None
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiasesOptions(Section):
    """A Weights & Biases run; needs the extra `wandb`."""

    project: str = Field(min_length=1)
    entity: str | None = Field(None, description="user or team; default: the account's")
    tags: tuple[str, ...] = ()


class WeightsAndBiases(MetricSink):
    """A Weights & Biases run; offline mode and credentials come from wandb's own environment variables."""

    Options = WeightsAndBiasesOptions

    def __init__(self, options: WeightsAndBiasesOptions, context: SinkContext) -> None:
        try:
            import wandb
        except ImportError as error:
            raise SpecError("log.wandb is set, but wandb is not installed: pip install 'keepwarm[wandb]'") from error
        self._run = wandb.init(
            project=options.project, entity=options.entity, tags=options.tags or None, name=context.run,
            dir=str(context.folder), resume="allow",
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
