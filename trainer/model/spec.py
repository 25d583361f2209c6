"""The `model` section of a job spec: one decoder-only transformer that covers many families. Torch-free."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from keepwarm.section import Count, Section

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class InitSpec(Section):
    """Standard deviations of the initial weights, as published for each family."""

    std: Positive = 0.02
    output_std: Positive | None = Field(None, description="of attention output and down projections; default: std")


class ModelSpec(Section):
    """Covers Llama, Mistral, Qwen2, Qwen3, OLMo 2, GPT-NeoX (Pythia), GPT and Megatron-Turing NLG."""

    layers: int = Field(gt=0, le=16_384)
    hidden_size: Count
    heads: Count
    kv_heads: Count | None = Field(None, description="grouped-query attention; default: heads")
    head_dim: Count | None = Field(None, description="default: hidden_size / heads")
    ffn_size: Count
    vocabulary_size: Count
    max_sequence_length: Count
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Positive = 1e-5
    norm_position: Literal["pre", "post"] = Field("pre", description="post: OLMo 2")
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    position: Literal["rotary", "learned"] = "rotary"
    rope_theta: Positive = 10000.0
    rotary_fraction: float = Field(1.0, gt=0, le=1, description="part of each head that rotates (GPT-NeoX: 0.25)")
    sliding_window: Count | None = Field(None, description="Mistral: attention to the last n tokens only")
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

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def size_per_head(self) -> int:
        return self.head_dim or self.hidden_size // self.heads

    @model_validator(mode="after")
    def _divides(self) -> "ModelSpec":
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide by heads {self.heads}")
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} does not divide by kv_heads {self.key_value_heads}")
        if round(self.size_per_head * self.rotary_fraction) % 2:
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
