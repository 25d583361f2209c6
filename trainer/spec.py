"""The job spec: everything a run executes, in one strict, frozen, torch-free object."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ft.spec import SnapshotSpec
from parallel.layout import Layout
from parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec, Section
from trainer.data.spec import DataSpec
from trainer.model.spec import ModelSpec
from trainer.schedule import LrSpec


class RampSpec(Section):
    """Global batch size that grows: `start`, then `increment` more samples in equal spans over `samples`."""

    start: PositiveInt
    increment: PositiveInt
    samples: PositiveInt = Field(description="samples over which the ramp reaches batch.global_size")


class BatchSpec(Section):
    """Samples per step. Gradient accumulation follows: global_size / (parallel.data x micro_size)."""

    global_size: PositiveInt
    micro_size: PositiveInt = 1
    ramp: RampSpec | None = None


class StageSpec(Section):
    """One stage of training: how many tokens, of what, at which learning rate."""

    name: str = Field(min_length=1)
    tokens: PositiveInt = Field(description="budget; rounded up to whole steps")
    mixture: dict[str, PositiveFloat] = Field(min_length=1, description="weight of each source, normalised")
    lr: LrSpec


class EvaluationSpec(Section):
    """Validation loss of every domain in data.validation: at the start, every n steps and at the end."""

    every: PositiveInt | None = Field(None, description="steps; null: only at the start and at the end")
    samples: PositiveInt = Field(64, description="samples per domain, at most")


class CheckpointSpec(Section):
    """Durable copies of the training state in OUTPUT/checkpoints; one is always written at the end."""

    every: PositiveInt | None = Field(None, description="steps; null: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")


class HealthSpec(Section):
    """When training warns, and when it stops itself."""

    max_skipped: PositiveInt = Field(5, description="non-finite steps in a row before training stops")
    spike_factor: float = Field(2.0, gt=1, description="warn when the loss exceeds its running mean by this factor")


class ProfileSpec(Section):
    """Steps to record: a Chrome trace, and on CUDA a memory snapshot, in OUTPUT/profile."""

    start: NonNegativeInt
    steps: PositiveInt


class LogSpec(Section):
    """Besides stdout and metrics.jsonl."""

    every: PositiveInt = Field(1, description="steps between log lines; metrics.jsonl has every step")
    tensorboard: bool = True
    wandb: str | None = Field(None, description="Weights & Biases project; needs the extra `wandb`")


class ClusterSpec(Section):
    """The machines that a job is planned for."""

    ranks_per_node: PositiveInt | None = Field(None, description="default: all ranks on one node")


class JobSpec(Section):
    """A whole job, as read from YAML by `trainer.spec_file.load_job`; `run.json` is its resolved form."""

    name: str = Field(min_length=1)
    output: str = Field(description="run folder; relative to the working directory")
    seed: NonNegativeInt = 1
    model: ModelSpec
    data: DataSpec
    batch: BatchSpec
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    optimizer: OptimizerSpec = OptimizerSpec()
    parallel: ParallelSpec = ParallelSpec()
    numerics: NumericsSpec = NumericsSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    health: HealthSpec = HealthSpec()
    log: LogSpec = LogSpec()
    profile: ProfileSpec | None = None
    cluster: ClusterSpec = ClusterSpec()
    snapshot: SnapshotSpec | Literal["off"] = "off"

    @property
    def layout(self) -> Layout:
        return Layout.of(self.parallel, self.cluster.ranks_per_node)

    @model_validator(mode="after")
    def _fits_together(self) -> "JobSpec":
        from trainer.spec_checks import check_job

        check_job(self)
        return self
