"""The job spec: everything a run executes, in one strict, frozen, torch-free object."""

from typing import Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from ft.spec import SnapshotSpec
from keepwarm.options import check_options
from keepwarm.section import Section
from parallel.layout import Layout
from parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from trainer.data.spec import DataSpec
from trainer.extensions import CALLBACKS
from trainer.model.spec import ModelSpec
from trainer.spec_checks import check_job
from trainer.spec_sections import (
    BatchSpec,
    CheckpointSpec,
    ClusterSpec,
    ComponentOptions,
    EvaluationSpec,
    HealthSpec,
    LogSpec,
    MovingAverageSpec,
    ProfileSpec,
    StageSpec,
)


class JobSpec(Section):
    """A whole job, as read from YAML by `trainer.spec_file.load_job`; `run.json` is its resolved form."""

    name: str = Field(min_length=1)
    output: str = Field(description="run folder; relative to the working directory")
    seed: NonNegativeInt = 1
    init_from: str | None = Field(None, description="run, checkpoint or URL whose weights and history to begin with")
    model: ModelSpec
    data: DataSpec
    batch: BatchSpec
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    optimizer: OptimizerSpec = OptimizerSpec()
    parallel: ParallelSpec = ParallelSpec()
    numerics: NumericsSpec = NumericsSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    moving_average: MovingAverageSpec | None = None
    checkpoint: CheckpointSpec = CheckpointSpec()
    health: HealthSpec = HealthSpec()
    log: LogSpec = LogSpec()
    profile: ProfileSpec | None = None
    callbacks: ComponentOptions = Field({}, description="loop callbacks of other packages by name, with their options")
    cluster: ClusterSpec = ClusterSpec()
    snapshot: SnapshotSpec | Literal["off"] = "off"

    @property
    def layout(self) -> Layout:
        return Layout.of(self.parallel, self.cluster.ranks_per_node)

    @field_validator("callbacks")
    @classmethod
    def _known_callbacks(cls, callbacks: ComponentOptions) -> ComponentOptions:
        check_options(CALLBACKS, callbacks)
        return callbacks

    @model_validator(mode="after")
    def _fits_together(self) -> "JobSpec":
        check_job(self)
        return self
