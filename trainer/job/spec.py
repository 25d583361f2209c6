"""The job spec: everything that defines a run, in one strict, frozen, torch-free object."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator, model_validator

from keepwarm.ft.spec import SnapshotSpec
from keepwarm.options import check_options
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.section import Section
from keepwarm.trainer.data.spec import DataSpec
from keepwarm.trainer.job.checks import check_job
from keepwarm.trainer.job.extensions import CALLBACKS
from keepwarm.trainer.job.sections import (
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
from keepwarm.trainer.model.any_spec import AnyModelSpec, validated_model


class JobSpec(Section):
    """A whole job, as read from YAML by `keepwarm.trainer.job.files.load_job`; `run.json` is its resolved form."""

    name: str = Field(min_length=1)
    output: str = Field(description="run folder; relative to the working directory")
    seed: NonNegativeInt = 1
    init_from: str | None = Field(
        None, description="run, checkpoint or URL to take the initial weights and history from"
    )
    init_from_ignore_keys: tuple[str, ...] = Field(
        (), description="fields of the Hugging Face config.json in init_from that change nothing"
    )
    model: AnyModelSpec
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

    @field_validator("model", mode="before")
    @classmethod
    def _kind_of_model(cls, values: Any, info: ValidationInfo) -> Any:
        return validated_model(values, info.mode)

    @field_validator("callbacks")
    @classmethod
    def _known_callbacks(cls, callbacks: ComponentOptions) -> ComponentOptions:
        check_options(CALLBACKS, callbacks)
        return callbacks

    @model_validator(mode="after")
    def _fits_together(self) -> "JobSpec":
        check_job(self)
        return self
