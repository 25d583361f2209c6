"""Sections of the job spec that belong to the trainer as a whole; those of a component stand beside it. Torch-free."""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    field_validator,
)

from keepwarm.options import check_options
from keepwarm.section import Section
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.job.cluster import BatchSections, KubernetesSpec, SlurmSpec
from keepwarm.trainer.job.curve import LrSpec
from keepwarm.trainer.job.extensions import METRIC_SINKS


class RampSpec(Section):
    """Global batch size that grows: `start`, then `increment` more samples in equal spans over `samples`."""

    start: PositiveInt
    increment: PositiveInt
    samples: PositiveInt = Field(description="samples over which the ramp reaches batch.global_batch_size")


class BatchSpec(Section):
    """Samples per step. Gradient accumulation follows: global_batch_size / (parallel.data x micro_batch_size)."""

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 1
    ramp: RampSpec | None = None


Mixture = dict[str, PositiveFloat]


class MixtureStep(Section):
    """Another mixture from a point of the stage on; the last steps of a stage are how domains are upsampled."""

    at: float = Field(gt=0, lt=1, description="fraction of the stage's samples")
    mixture: Mixture = Field(min_length=1)


class MixtureRamp(Section):
    """The mixture moves in a straight line to another one, as a staircase."""

    to: Mixture = Field(min_length=1, description="mixture at the end of the ramp and after it")
    start: float = Field(0.0, ge=0, lt=1, description="fraction of the stage's samples")
    end: float = Field(1.0, gt=0, le=1, description="fraction of the stage's samples")
    stairs: PositiveInt = Field(16, description="each with the mixture of its middle")


class GateSpec(Section):
    """What to do when a domain forgets: its loss above that at the beginning of the stage, in nats per token."""

    domain: str = Field(description="of data.validation")
    max_forgetting: NonNegativeFloat
    action: Literal["stop", "warn"] = "stop"


class StageSpec(Section):
    """One stage of training: how many tokens, of what, at which learning rate."""

    name: str = Field(min_length=1)
    tokens: PositiveInt = Field(description="budget; rounded up to whole steps")
    mixture: Mixture = Field(min_length=1, description="weight of each source, normalised")
    mixture_steps: tuple[MixtureStep, ...] = Field((), description="other mixtures later in the stage")
    mixture_ramp: MixtureRamp | None = None
    replay: ReplaySpec | tuple[ReplaySpec, ...] = Field((), description="one clause, or a list of them")
    lr: SerializeAsAny[LrSpec]
    sequence_length: PositiveInt | None = Field(None, description="tokens per sample; default: data.sequence_length")
    skip: NonNegativeInt = Field(
        0, description="samples of every source passed over at the beginning: branches that are averaged see other data"
    )
    optimizer_state: Literal["keep", "reset"] = Field("keep", description="moments and step counter at the beginning")
    evaluate: tuple[str, ...] | None = Field(
        None, description="domains evaluated inside the stage; default: all. At its beginning and end it is always all"
    )
    gate: GateSpec | None = Field(None, description="judged whenever the domain is evaluated")

    @property
    def replays(self) -> tuple[ReplaySpec, ...]:
        """The clauses of `replay`, however many were given."""
        return (self.replay,) if isinstance(self.replay, ReplaySpec) else self.replay

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """Every mixture that the stage comes through, those inside a ramp aside."""
        ramp = () if self.mixture_ramp is None else (self.mixture_ramp.to,)
        return (self.mixture, *(step.mixture for step in self.mixture_steps), *ramp)


class EvaluationSpec(Section):
    """Validation loss of every domain in data.validation: at the start, every n steps and at the end."""

    every: PositiveInt | None = Field(None, description="steps; null: only at the start and at the end")
    samples: PositiveInt = Field(64, description="samples per domain, at most")


class CheckpointSpec(Section):
    """Durable copies of the training state in OUTPUT/checkpoints; one is always written at the end."""

    every: PositiveInt | None = Field(None, description="steps; null: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")


class MovingAverageSpec(Section):
    """An exponential moving average of the weights, kept in every snapshot and checkpoint beside them."""

    decay: float = Field(gt=0, lt=1, description="per step; 0.999 averages over about a thousand steps")


class HealthSpec(Section):
    """When training warns, and when it stops itself."""

    max_skipped: PositiveInt = Field(5, description="non-finite steps in a row before training stops")
    spike_factor: float = Field(2.0, gt=1, description="warn when the loss exceeds its running mean by this factor")
    min_hang_timeout: PositiveFloat | None = Field(
        120.0, description="seconds that any step may take before training is taken to hang; null: for ever"
    )
    hang_factor: float = Field(10.0, gt=1, description="and times the median step, whichever is longer")
    straggler_every: PositiveInt | None = Field(100, description="steps between looks for slow ranks; null: never")
    straggler_factor: float = Field(1.3, gt=1, description="name ranks because of which steps take so much longer")


class ProfileSpec(Section):
    """Steps to record: a Chrome trace, and on CUDA a memory snapshot, in OUTPUT/profile."""

    start: NonNegativeInt
    steps: PositiveInt


ComponentOptions = dict[str, dict[str, Any]]
"""Registered components by name, each with its options; `{}` where it has none."""


class LogSpec(Section):
    """Where metrics go, besides stdout and metrics.jsonl."""

    every: PositiveInt = Field(1, description="steps between log lines; metrics.jsonl has every step")
    tensorboard: bool = Field(True, description="short for sinks: {tensorboard: {}}")
    wandb: str | None = Field(
        None,
        description="Weights & Biases project, short for sinks: {wandb: {project: NAME}}; needs the extra `wandb`",
    )
    sinks: ComponentOptions = Field({}, description="metric sinks by name, each with its options")

    @field_validator("sinks")
    @classmethod
    def _known_sinks(cls, sinks: ComponentOptions) -> ComponentOptions:
        check_options(METRIC_SINKS, sinks)
        return sinks

    @property
    def chosen(self) -> ComponentOptions:
        """Every sink with its options, the short forms included; `sinks` overrules them."""
        tensorboard: ComponentOptions = {"tensorboard": {}} if self.tensorboard else {}
        wandb: ComponentOptions = {} if self.wandb is None else {"wandb": {"project": self.wandb}}
        return tensorboard | wandb | self.sinks


class ClusterSpec(BatchSections):
    """The machines that a job is planned for."""

    ranks_per_node: PositiveInt | None = Field(None, description="default: all ranks on one node")
    max_restarts: NonNegativeInt = Field(3, description="times that crashed ranks start again; only with snapshots")
    max_node_failures: PositiveInt = Field(
        3, description="starts that ranks of one node may end within a day before a spare takes its place"
    )
    elastic: Literal["wait", "shrink"] = Field(
        "wait", description="shrink: with no spare left, go on with fewer data-parallel replicas until nodes are back"
    )
    min_data_parallel: PositiveInt = Field(1, description="elastic: shrink: data-parallel replicas that are enough")
    shrink_after: PositiveFloat = Field(30.0, description="elastic: shrink: seconds that a node is waited for before")
    in_process: Literal["auto", "on", "off"] = Field(
        "auto", description="workers start again in their process when others have died; auto: those without a GPU"
    )
    slurm: SlurmSpec = SlurmSpec()
    kubernetes: KubernetesSpec | None = None
