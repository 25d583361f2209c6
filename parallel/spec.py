"""Sections of the job spec that configure this package. Torch-free."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Field,
    PositiveFloat,
    SerializeAsAny,
    ValidationInfo,
    create_model,
    field_validator,
)

from keepwarm.options import check_name, validated
from keepwarm.parallel.engine_registry import ENGINES
from keepwarm.section import Ranks, Section, Threads

DEFAULT_ENGINE = "torch"
Beta = Annotated[float, Field(ge=0, lt=1)]
Options = TypeVar("Options", bound=Section)


class ParallelSpec(Section):
    """Layout of the ranks, and the form of parallelism on each axis of the mesh."""

    engine: str = Field(
        DEFAULT_ENGINE, description="what runs the mesh: torch, megatron, deepspeed, or an engine of another package"
    )
    options: SerializeAsAny[Section] = Field(
        Section(), validate_default=True, description="keys that only this engine has"
    )
    tensor: Ranks = Field(1, description="ranks that share each matrix")
    pipeline: Ranks = Field(1, description="ranks that share the layers, one after the other")
    data: Ranks = Field(1, description="ranks that share the global batch")
    sequence: bool = Field(False, description="shard activations along the sequence between the matrices")
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    stages_per_rank: Ranks | None = Field(
        None, description="pipeline stages on one rank; default 1 for 1f1b, 2 for the others"
    )
    layer_split: tuple[Ranks, ...] | None = Field(
        None, description="layers of each pipeline stage, first to last; default: equal"
    )
    data_mode: Literal["fsdp", "hsdp", "ddp"] = "fsdp"
    reshard_after_forward: bool | None = Field(
        None,
        description="fsdp, hsdp: free gathered weights after forward and backward; default: not with a pipeline or "
        "several micro-batches, if they fit in cluster.gpu_memory (zero_bubble always keeps them for the step)",
    )
    accumulate: Literal["auto", "whole", "sharded"] = Field(
        "auto",
        description="fsdp, hsdp: gradients between micro-batches. whole: reduced once per step; sharded: reduced after "
        "each micro-batch; auto: whole if that fits in cluster.gpu_memory",
    )
    shard_size: Ranks | None = Field(None, description="hsdp: data-parallel ranks that share one copy")

    @property
    def stages(self) -> int:
        """Number of pipeline stages over all ranks."""
        per_rank = self.stages_per_rank or (1 if self.schedule == "1f1b" else 2)
        return self.pipeline * per_rank if self.pipeline > 1 else 1

    def options_as(self, kind: type[Options]) -> Options:
        """Return the engine's options as `kind`. Raise TypeError if they are those of another engine."""
        if not isinstance(self.options, kind):
            raise TypeError(f"options of parallel.engine = {self.engine} are no {kind.__name__}")
        return self.options

    @field_validator("engine")
    @classmethod
    def _registered(cls, name: str) -> str:
        check_name(ENGINES, name)
        return name

    @field_validator("options", mode="before")
    @classmethod
    def _of_engine(cls, values: Any, info: ValidationInfo) -> Any:
        """Validate the options as the engine's own section."""
        if "engine" not in info.data:  # already rejected
            return Section()
        own = ENGINES.get(info.data["engine"]).Options
        if type(values) is Section:  # the default
            values = {}
        return validated(own, values, info.mode)

    @classmethod
    def variant(cls, values: Any) -> type[Section]:
        name = values.get("engine", DEFAULT_ENGINE) if isinstance(values, dict) else None
        own = next((engine.Options for usable, engine in ENGINES.usable() if usable == name), None)
        return cls if own is None else create_model(cls.__name__, __base__=cls, options=(own, ...))


class OptimizerSpec(Section):
    """The update rule. The learning rate itself comes from the stage's `lr` clause."""

    name: Literal["adamw", "sgd", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of layers, AdamW for all other parameters"
    )
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="muon only: of the matrices")
    weight_decay: float = Field(0.1, ge=0)
    decay_embeddings: bool = Field(True, description="false: no weight decay on embeddings (OLMo 2)")
    clip_norm: PositiveFloat | None = Field(1.0, description="largest global gradient norm; null: no clipping")
    implementation: Literal["torch", "apex"] = Field("torch", description="apex: FusedAdam, when importable")

    def orthogonalises(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether Muon updates the parameter with this canonical name: the matrices inside layers."""
        return self.name == "muon" and name.startswith("layers.") and len(shape) == 2


class NumericsSpec(Section):
    """Precision, and trade-offs between memory, speed and reproducibility."""

    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="bf16: bf16 compute, fp32 master weights, moments and reduction"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations computed again in backward: nothing, attention only, whole layers"
    )
    norms: Literal["torch", "apex"] = Field("torch", description="apex: FusedRMSNorm, FusedLayerNorm, on a GPU")
    compile: bool = Field(False, description="torch.compile each layer")
    tf32: bool = Field(False, description="CUDA: multiply fp32 matrices in TF32, faster and with 10 bits of mantissa")
    deterministic: bool = Field(
        False, description="CUDA: bitwise repeatable kernels, without which two runs on GPUs differ"
    )
    threads_per_rank: Threads = Field(1, description="CPU threads of each rank; part of what fixes the bits")
