"""The `model` section of a job spec: one decoder-only transformer that covers many families. Torch-free."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from keepwarm.section import Count, Section

MOST_LAYERS = 10_000


class InitSpec(Section):
    """Standard deviations of the initial weights, as published for each family."""

    std: PositiveFloat = 0.02
    output_std: PositiveFloat | None = Field(None, description="of attention output and down projections; default: std")


class RopeScalingSpec(Section):
    """Scaled rotary frequencies for longer contexts; `keepwarm.trainer.model.rotary` has the formulas."""

    type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = Field(ge=1, lt=2**31, description="by how much the context grows")
    original_max_sequence_length: int | None = Field(
        None, gt=1, lt=2**31, description="before the context grew; default: max_sequence_length"
    )
    low_frequency_factor: PositiveFloat = Field(1.0, description="llama3")
    high_frequency_factor: PositiveFloat = Field(4.0, description="llama3")
    beta_fast: PositiveFloat = Field(
        32.0, description="yarn: rotations in the original context from which none is scaled"
    )
    beta_slow: PositiveFloat = Field(1.0, description="yarn: rotations up to which all is scaled")
    truncate: bool = Field(True, description="yarn: round the range between them to whole features")
    short_factors: tuple[PositiveFloat, ...] = Field(
        (), description="longrope: by frequency, within the original context"
    )
    long_factors: tuple[PositiveFloat, ...] = Field((), description="longrope: by frequency, beyond it")
    attention_factor: PositiveFloat | None = Field(None, description="yarn, longrope; default: follows from factor")
    layers: Literal["all", "full_attention"] = Field("all", description="full_attention: none with a window (OLMo 3)")

    @model_validator(mode="after")
    def _ordered(self) -> "RopeScalingSpec":
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError("low_frequency_factor must be below high_frequency_factor")
        if (self.type == "longrope") != bool(self.short_factors and self.long_factors):
            raise ValueError("short_factors and long_factors are needed for longrope, and for nothing else")
        return self


class ModelSpec(Section):
    """Covers Llama, Mistral, Qwen2, Qwen3, OLMo 2 and 3, SmolLM3, GPT-NeoX (Pythia), GPT and Megatron-Turing NLG."""

    layers: int = Field(gt=0, le=MOST_LAYERS)
    hidden_size: Count
    heads: Count
    kv_heads: Count | None = Field(None, description="grouped-query attention; default: heads")
    head_dim: Count | None = Field(None, description="default: hidden_size / heads")
    ffn_size: Count
    vocabulary_size: Count
    max_sequence_length: Count
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: PositiveFloat = 1e-5
    norm_position: Literal["pre", "post"] = Field("pre", description="post: OLMo 2")
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    position: Literal["rotary", "learned"] = "rotary"
    rope_theta: PositiveFloat = 10000.0
    rotary_fraction: float = Field(1.0, gt=0, le=1, description="part of each head that rotates (GPT-NeoX: 0.25)")
    rope_scaling: RopeScalingSpec | None = None
    nope_layers: tuple[NonNegativeInt, ...] = Field((), description="layers without rotary positions (SmolLM3)")
    sliding_window: Count | None = Field(None, description="Mistral: attention to the last n tokens only")
    full_attention_layers: tuple[NonNegativeInt, ...] = Field(
        (), description="layers that attend to everything although there is a window (OLMo 3)"
    )
    parallel_residual: bool = Field(False, description="GPT-NeoX: attention and MLP read the same input")
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "projection"] = Field(
        "none", description="head: each head by itself (Qwen3); projection: all heads together (OLMo 2)"
    )
    tied_embeddings: bool = False
    init: InitSpec = InitSpec()
    z_loss: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="weight of the squared log-partition (OLMo 2: 1e-5)"
    )

    @classmethod
    def is_meant(cls, values: Any) -> bool:
        return not (isinstance(values, Mapping) and "transformers" in values)

    @property
    def is_native(self) -> bool:
        """Whether `keepwarm.trainer.model.decoder` computes the model."""
        return True

    @property
    def has_gate(self) -> bool:
        """Whether the MLP multiplies with a gate."""
        return self.activation == "swiglu"

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.qk_norm != "none"

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def size_per_head(self) -> int:
        return self.head_dim or self.hidden_size // self.heads

    @property
    def rotating(self) -> int:
        """Number of features of each head that rotate."""
        return int(self.size_per_head * self.rotary_fraction)

    @property
    def original_length(self) -> int:
        """Context before rotary frequencies were scaled."""
        scaling = self.rope_scaling
        return (scaling and scaling.original_max_sequence_length) or self.max_sequence_length

    @property
    def attention_factor(self) -> float:
        """Factor of cosines and sines of scaled layers; its square scales the logits of attention.

        yarn: `0.1 ln(factor) + 1` (Peng et al., 2023); longrope: `sqrt(1 + ln(factor) / ln(original))` (Ding et al.,
        2024).
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.type not in ("yarn", "longrope"):
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        if scaling.type == "yarn":
            return 0.1 * math.log(scaling.factor) + 1.0
        return math.sqrt(1 + math.log(scaling.factor) / math.log(self.original_length))

    def window(self, layer: int) -> int | None:
        """Return the window of a layer, or None."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def rotary(self, layer: int) -> Literal["none", "plain", "scaled"]:
        """Return how a layer rotates."""
        if self.position != "rotary" or layer in self.nope_layers:
            return "none"
        scaling = self.rope_scaling
        if scaling is None or (scaling.layers == "full_attention" and self.window(layer) is not None):
            return "plain"
        return "scaled"

    def of_layers(self, sources: Sequence[int]) -> "ModelSpec":
        """Return the spec of a model whose layers are these of this one, in order."""
        kept: dict[str, Any] = {
            name: tuple(index for index, source in enumerate(sources) if source in getattr(self, name))
            for name in ("nope_layers", "full_attention_layers")
        }
        return self.model_copy(update={"layers": len(sources), **kept})

    @model_validator(mode="after")
    def _layers_exist(self) -> "ModelSpec":
        for name in ("nope_layers", "full_attention_layers"):
            layers = getattr(self, name)
            if list(layers) != sorted(set(layers)) or (layers and layers[-1] >= self.layers):
                raise ValueError(f"{name} must be ascending indices below layers = {self.layers}")
        if self.full_attention_layers and self.sliding_window is None:
            raise ValueError("full_attention_layers: without sliding_window all layers attend to everything")
        return self

    @model_validator(mode="after")
    def _scaling_fits(self) -> "ModelSpec":
        scaling = self.rope_scaling
        if self.position != "rotary" and (scaling is not None or self.nope_layers):
            raise ValueError("rope_scaling and nope_layers need position = rotary")
        if scaling is None:
            return self
        half = self.rotating // 2
        for name in ("short_factors", "long_factors"):
            if getattr(scaling, name) and len(getattr(scaling, name)) != half:
                raise ValueError(f"rope_scaling.{name} must have {half} values, one for each frequency")
        if self.original_length < 2 or self.rotating < 4 or self.rope_theta <= 1:
            raise ValueError("rope_scaling needs an original context of 2 tokens, 4 rotating features, rope_theta > 1")
        return self

    @model_validator(mode="after")
    def _divides(self) -> "ModelSpec":
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide by heads {self.heads}")
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} does not divide by kv_heads {self.key_value_heads}")
        if self.rotating % 2:
            raise ValueError(f"rotary_fraction {self.rotary_fraction} of a head of {self.size_per_head} is odd")
        return self


def stored_model_spec(fields: Any) -> ModelSpec:
    """Return the model spec that a manifest, run or export of this or an earlier version holds.

    Raises:
        ValueError: it is none.
    """
    if isinstance(fields, Mapping) and fields.get("norm_position") in ("before", "after"):
        # What versions before 0.2 stored.
        fields = {**fields, "norm_position": "pre" if fields["norm_position"] == "before" else "post"}
    return ModelSpec.model_validate_json(json.dumps(fields))
