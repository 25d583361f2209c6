"""Which engines there are, what each needs installed, and what it cannot express. Torch-free: asked before a start."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from keepwarm.parallel.architecture import Architecture
from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.spec import EngineName, NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.tested import TESTED, installed


class Job(Protocol):
    """The sections of a job that an engine may refuse; `keepwarm.trainer.job.spec.JobSpec` has them."""

    @property
    def model(self) -> Architecture: ...
    @property
    def parallel(self) -> ParallelSpec: ...
    @property
    def optimizer(self) -> OptimizerSpec: ...
    @property
    def numerics(self) -> NumericsSpec: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """A distribution of which an engine uses what may change with any version other than those it was tested with."""

    distribution: str
    """One of `keepwarm.tested.TESTED`."""
    install: str
    """The command that installs it."""

    def problem(self) -> str | None:
        """Why it cannot be used, with the command that mends it; None when it can."""
        found, tested = installed(self.distribution), TESTED[self.distribution]
        if found is None:
            return f"{self.distribution} is not installed: {self.install}"
        if found not in tested:
            return f"{self.distribution} {found} is installed, tested is {tested}: {self.install}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """One engine: where its class is, what it needs, and what it refuses."""

    module: str
    """Imported only by a rank that runs this engine."""
    name: str
    """Of the class."""
    requirements: tuple[Requirement, ...]
    in_process: bool
    """It can be closed after a failure and made again in the same process: nothing of it lives in module globals."""
    refuses: Callable[[Job], Iterator[str]]


def require(engine: EngineName) -> None:
    """Raise EngineUnavailable when something that the engine needs is missing or of an untested version."""
    problems = [text for one in ENGINES[engine].requirements if (text := one.problem()) is not None]
    if problems:
        raise EngineUnavailable(f"parallel.engine = {engine}: " + "; ".join(problems))


def refusals(job: Job) -> list[str]:
    """What the job asks for and its engine cannot express, a line each with key, reason and way out; pure."""
    engine = job.parallel.engine
    return [f"parallel.engine = {engine}: {reason}" for reason in ENGINES[engine].refuses(job)]


def _torch(job: Job) -> Iterator[str]:
    yield from _zero_elsewhere(job.parallel)
    yield from _transformer_engine_elsewhere(job.parallel)
    if job.numerics.norms == "apex" and job.parallel.sequence:
        yield "numerics.norms = apex: with parallel.sequence its norms are split by DTensor; set torch"


def _megatron(job: Job) -> Iterator[str]:
    yield from _families_of_gpt_model(job.model)
    parallel = job.parallel
    yield from _zero_elsewhere(parallel)
    if parallel.schedule == "zero_bubble" and parallel.pipeline > 1:
        yield "parallel.schedule: Megatron Core has 1f1b and interleaved, no zero_bubble"
    if parallel.layer_split is not None and len(set(parallel.layer_split)) > 1:
        yield "parallel.layer_split: every stage holds the same number of layers; leave it out"
    if parallel.data_mode == "hsdp":
        yield (
            "parallel.data_mode: fsdp (the distributed optimizer: optimizer state is sharded, weights are not) or "
            "ddp, no hsdp"
        )
    if job.optimizer.name == "sgd" and parallel.data_mode != "ddp":
        yield "optimizer.name = sgd: the distributed optimizer knows AdamW alone; set parallel.data_mode = ddp"
    if parallel.transformer_engine and job.numerics.norms == "apex":
        yield "numerics.norms = apex: parallel.transformer_engine brings its own norms; set one of them"
    if job.numerics.precision == "fp64":
        yield "numerics.precision: fp32 or bf16; its optimizers refuse fp64"
    if job.numerics.compile:
        yield "numerics.compile: its layers are not compiled; set false"


def _deepspeed(job: Job) -> Iterator[str]:
    parallel = job.parallel
    yield from _transformer_engine_elsewhere(parallel)
    if parallel.sequence:
        yield "parallel.sequence: activations stay whole between the matrices; set false"
    if parallel.pipeline > 1 and (parallel.schedule != "1f1b" or parallel.stages != parallel.pipeline):
        yield "parallel.schedule: its pipeline has 1f1b with one stage on each rank alone"
    if parallel.pipeline > 1 and parallel.zero_stage > 1:
        yield f"parallel.zero_stage = {parallel.zero_stage}: its pipeline needs whole gradients until the last; set 1"
    if parallel.data_mode != "fsdp":
        yield "parallel.data_mode: ZeRO always shards, by parallel.zero_stage; leave it out"
    if parallel.offload_optimizer and job.optimizer.implementation == "apex":
        yield "parallel.offload_optimizer: Apex updates on a GPU alone; set optimizer.implementation = torch"
    if job.numerics.precision == "fp64":
        yield "numerics.precision = fp64: ZeRO keeps its master weights in fp32 whatever the model's type"
    if job.numerics.precision == "bf16" and parallel.tensor > 1:
        yield "numerics.precision = bf16: with parallel.tensor > 1 it has not been shown to compute alike; set fp32"
    if job.numerics.compile:
        yield "numerics.compile: its hooks and compiled layers have not been tried together; set false"


def _zero_elsewhere(parallel: ParallelSpec) -> Iterator[str]:
    if parallel.zero_stage != 1 or parallel.offload_optimizer:
        yield "parallel.zero_stage, parallel.offload_optimizer: for parallel.engine = deepspeed alone"


def _transformer_engine_elsewhere(parallel: ParallelSpec) -> Iterator[str]:
    if parallel.transformer_engine:
        yield "parallel.transformer_engine: for parallel.engine = megatron alone"


def _families_of_gpt_model(model: Architecture) -> Iterator[str]:
    """What the transformer layers of Megatron Core 0.16 lack."""
    if model.norm_position == "post":
        yield "model.norm_position = post (OLMo 2): its layers normalise before attention and MLP"
    if model.parallel_residual:
        yield "model.parallel_residual (GPT-NeoX): its layers run attention and MLP one after the other"
    if model.qk_norm == "projection":
        yield "model.qk_norm = projection (OLMo 2): it normalises each head by itself"
    if model.sliding_window is not None:
        yield "model.sliding_window (Mistral): its layers without Transformer Engine attend to the whole sequence"
    if model.attention_output_bias != model.mlp_bias or (model.mlp_bias and not model.qkv_bias):
        yield (
            "model.mlp_bias, attention_output_bias, qkv_bias: it has biases everywhere, nowhere, or in query, key and "
            "value alone"
        )


MEGATRON = Requirement(
    distribution="megatron-core",
    install="pip install 'keepwarm[megatron]'",
)
DEEPSPEED = Requirement(
    distribution="deepspeed",
    install="DS_BUILD_OPS=0 pip install 'keepwarm[deepspeed]'",
)

ENGINES: Mapping[EngineName, EngineInfo] = {
    "torch": EngineInfo(
        module="keepwarm.parallel.native.engine", name="TorchEngine", requirements=(), in_process=True, refuses=_torch
    ),
    "megatron": EngineInfo(
        module="keepwarm.parallel.megatron.engine",
        name="MegatronEngine",
        requirements=(MEGATRON,),
        in_process=True,
        refuses=_megatron,
    ),
    "deepspeed": EngineInfo(
        module="keepwarm.parallel.deepspeed.engine",
        name="DeepSpeedEngine",
        requirements=(DEEPSPEED, MEGATRON),
        in_process=False,
        refuses=_deepspeed,
    ),
}
