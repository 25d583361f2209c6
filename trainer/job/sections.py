"""Sections of the job spec that belong to no single component; components define their own. Torch-free."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    field_validator,
)

from keepwarm.options import check_options
from keepwarm.section import Count, FewOrNone, Ranks, Seconds, Section
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.job.cluster import BatchSections, KubernetesSpec, SlurmSpec
from keepwarm.trainer.job.curve import LrSpec
from keepwarm.trainer.job.extensions import METRIC_SINKS


class RampSpec(Section):
    """A growing global batch size: from `start`, raised by `increment` samples at equal intervals over `samples`."""

    start: Count
    increment: Count
    samples: PositiveInt = Field(description="samples until the ramp reaches batch.global_batch_size")


class BatchSpec(Section):
    """Samples per step. Gradient accumulation follows: global_batch_size / (parallel.data x micro_batch_size)."""

    global_batch_size: Count
    micro_batch_size: Count = 1
    ramp: RampSpec | None = None


Mixture = dict[str, Annotated[float, Field(gt=0, le=1e15)]]


class MixtureStep(Section):
    """A different mixture from a point of the stage on, for instance to upsample domains at its end."""

    at: float = Field(gt=0, lt=1, description="fraction of the stage's samples")
    mixture: Mixture = Field(min_length=1)


class MixtureRamp(Section):
    """A mixture that changes linearly to another one, in discrete steps."""

    to: Mixture = Field(min_length=1, description="mixture from the end of the ramp on")
    start: float = Field(0.0, ge=0, lt=1, description="fraction of the stage's samples")
    end: float = Field(1.0, gt=0, le=1, description="fraction of the stage's samples")
    stairs: PositiveInt = Field(
        16, le=10_000, description="number of discrete steps, each with the mixture at its midpoint"
    )


class GateSpec(Section):
    """The response to forgetting, measured as a domain's loss above its value at the start of the stage, in nats per
    token.
    """

    domain: str = Field(description="a domain of data.validation")
    max_forgetting: NonNegativeFloat
    action: Literal["stop", "warn"] = "stop"


class StageSpec(Section):
    """One stage of training: its token budget, data mixture and learning rate."""

    name: str = Field(min_length=1)
    tokens: PositiveInt = Field(le=2**53, description="token budget; rounded up to whole steps")
    mixture: Mixture = Field(min_length=1, description="weight of each source; normalised")
    mixture_steps: tuple[MixtureStep, ...] = Field((), description="other mixtures later in the stage")
    mixture_ramp: MixtureRamp | None = None
    replay: ReplaySpec | tuple[ReplaySpec, ...] = Field((), description="one clause or a list")
    lr: SerializeAsAny[LrSpec]
    sequence_length: Count | None = Field(None, description="tokens per sample; default: data.sequence_length")
    skip: NonNegativeInt = Field(
        0,
        description="samples of every source to skip at the start, so that branches to be averaged see different data",
    )
    optimizer_state: Literal["keep", "reset"] = Field(
        "keep", description="moments and step counter at the start of the stage"
    )
    evaluate: tuple[str, ...] | None = Field(
        None, description="domains evaluated within the stage; default: all. At its start and end, all are evaluated"
    )
    gate: GateSpec | None = Field(None, description="checked whenever the domain is evaluated")

    @property
    def replays(self) -> tuple[ReplaySpec, ...]:
        """The clauses of `replay` as a tuple."""
        return (self.replay,) if isinstance(self.replay, ReplaySpec) else self.replay

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """Every mixture of the stage, except those within a ramp."""
        ramp = () if self.mixture_ramp is None else (self.mixture_ramp.to,)
        return (self.mixture, *(step.mixture for step in self.mixture_steps), *ramp)


class EvaluationSpec(Section):
    """Validation loss of every domain in data.validation: at the start, at the end and every n steps."""

    every: PositiveInt | None = Field(None, description="steps; null: only at the start and at the end")
    samples: PositiveInt = Field(64, description="maximum samples per domain")


class CheckpointSpec(Section):
    """Durable copies of the training state in OUTPUT/checkpoints. One is always written at the end."""

    every: PositiveInt | None = Field(None, description="steps; null: only at the end")
    keep: PositiveInt = Field(2, description="number of newest checkpoints to keep")


class MovingAverageSpec(Section):
    """An exponential moving average of the weights, included in every snapshot and checkpoint."""

    decay: float = Field(gt=0, lt=1, description="per step; 0.999 averages over about a thousand steps")


class HealthSpec(Section):
    """Thresholds for warnings and for stopping training."""

    max_skipped: PositiveInt = Field(5, description="consecutive non-finite steps before training stops")
    spike_factor: float = Field(2.0, gt=1, description="warn when the loss exceeds its running mean by this factor")
    min_hang_timeout: Seconds | None = Field(
        120.0, description="minimum time limit of a step in seconds, after which training counts as hung; null: none"
    )
    hang_factor: float = Field(
        10.0, gt=1, description="time limit of a step in median step times; min_hang_timeout applies if longer"
    )
    straggler_every: PositiveInt | None = Field(100, description="steps between checks for slow ranks; null: never")
    straggler_factor: float = Field(1.3, gt=1, description="report ranks that slow the job down by this factor")
    device_check_every: PositiveInt | None = Field(
        None,
        description="steps between checks that every device computes a known product, and all together a known sum; "
        "null: only before the first step, on GPUs",
    )


class ProfileSpec(Section):
    """Steps to record: a Chrome trace, and on CUDA a memory snapshot, in OUTPUT/profile."""

    start: NonNegativeInt
    steps: PositiveInt


ComponentOptions = dict[str, dict[str, Any]]
"""Registered components by name, each with its options; `{}` for none."""


class LogSpec(Section):
    """Destinations of metrics, besides stdout and metrics.jsonl."""

    every: PositiveInt = Field(1, description="steps between log lines; metrics.jsonl has every step")
    tensorboard: bool = Field(True, description="shorthand for sinks: {tensorboard: {}}")
    wandb: str | None = Field(
        None,
        description="Weights & Biases project, shorthand for sinks: {wandb: {project: NAME}}; needs the extra `wandb`",
    )
    sinks: ComponentOptions = Field({}, description="metric sinks by name, each with its options")

    @field_validator("sinks")
    @classmethod
    def _known_sinks(cls, sinks: ComponentOptions) -> ComponentOptions:
        check_options(METRIC_SINKS, sinks)
        return sinks

    @property
    def chosen(self) -> ComponentOptions:
        """Return every selected sink with its options; `sinks` overrides the shorthands."""
        tensorboard: ComponentOptions = {"tensorboard": {}} if self.tensorboard else {}
        wandb: ComponentOptions = {} if self.wandb is None else {"wandb": {"project": self.wandb}}
        return tensorboard | wandb | self.sinks


class ClusterSpec(BatchSections):
    """The machines that a job is planned for."""

    ranks_per_node: Ranks | None = Field(None, description="default: all ranks on one node")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="cuda: refuse to start without a GPU for every rank, as gpus_per_node of a batch system implies; "
        "auto: the accelerator of torch, such as cuda, if all ranks see one, cpu if none does",
    )
    numa: Literal["auto", "off"] = Field(
        "auto", description="auto: bind each rank on a GPU to the CPUs of the GPU's NUMA node; off: bind nothing"
    )
    gpu_memory: float = Field(
        80.0,
        gt=0,
        le=1e6,
        description="GiB of each GPU, or of host memory for each rank without one: where the plan has a choice, "
        "it takes the fastest that fits; part of what fixes the bits",
    )
    max_restarts: FewOrNone = Field(3, description="maximum restarts of crashed ranks; requires snapshots")
    max_node_failures: PositiveInt = Field(
        3, description="starts that a node's ranks may fail within a day before a spare replaces it"
    )
    elastic: Literal["wait", "shrink"] = Field(
        "wait", description="shrink: with no spare left, continue with fewer data-parallel replicas until nodes return"
    )
    min_data_parallel: Ranks = Field(1, description="elastic: shrink: minimum data-parallel replicas")
    shrink_after: Seconds = Field(30.0, description="elastic: shrink: seconds to wait for a node first")
    in_process: Literal["auto", "on", "off"] = Field(
        "auto", description="restart workers within their process when others die; auto: only without a GPU"
    )
    slurm: SlurmSpec = SlurmSpec()
    kubernetes: KubernetesSpec | None = None
    sources: dict[str, str] | None = Field(
        None,
        description="written by keepwarm: the source of each value of this section: `job`, a site file or the cluster",
    )
