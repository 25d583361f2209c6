"""Llama, and the parts that its descendant families share. Torch-free."""

from typing import Any, ClassVar

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import (
    Config,
    ModelFamily,
    read_shared,
    read_sizes,
    write_shared,
    write_sizes,
)
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.layer_types import SLIDING, read_layer_types
from keepwarm.trainer.model.families.rope_config import add_rope, read_rope
from keepwarm.trainer.model.families.tensor_names import TensorNames
from keepwarm.trainer.model.spec import ModelSpec


class LlamaFamily(ModelFamily):
    """Llama 1 to 3.3. A descendant overrides the defaults, `read_own` and `write_own`."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"
    tensors = TensorNames(
        top={"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
        layer="model.layers.{}.",
        inside={
            "attention_norm": "input_layernorm",
            "attention.query": "self_attn.q_proj",
            "attention.key": "self_attn.k_proj",
            "attention.value": "self_attn.v_proj",
            "attention.output": "self_attn.o_proj",
            "attention.query_norm": "self_attn.q_norm",
            "attention.key_norm": "self_attn.k_norm",
            "mlp_norm": "post_attention_layernorm",
            "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj",
        },
    )
    # Transformers' value for a missing field; None: kv_heads = heads, head_dim = hidden_size / heads.
    default_kv_heads: ClassVar[int | None] = None
    default_head_dim: ClassVar[int | None] = None
    default_norm_eps: ClassVar[float] = 1e-6
    tied: ClassVar[bool] = False

    def read_config(self, config: ConfigFields) -> dict[str, Any]:
        config.harmless("attention_dropout")
        sizes = read_sizes(config)
        return {
            **sizes,
            "kv_heads": config.integer("num_key_value_heads", self.default_kv_heads or sizes["heads"]),
            "head_dim": config.take("head_dim", self.default_head_dim),
            "norm": "rms",
            "norm_eps": config.number("rms_norm_eps", self.default_norm_eps),
            "activation": config.choose("hidden_act", "silu", {"silu": "swiglu", "swish": "swiglu"}),
            **self.read_window(config, sizes["layers"]),
            **self.read_own(config),
            **self.read_rotary(config),
            **read_shared(config, tied=self.tied),
        }

    def write_config(self, spec: ModelSpec) -> Config:
        return {
            **write_shared(spec),
            **write_sizes(spec),
            "attention_dropout": 0.0,
            "num_key_value_heads": spec.key_value_heads,
            "hidden_act": "silu",
            "rms_norm_eps": spec.norm_eps,
            **self.write_own(spec),
        }

    def in_both_dialects(self, config: Config, spec: ModelSpec) -> Config:
        rope = {"rope_theta": spec.rope_theta}
        return add_rope(config, spec, old=rope, parameters=rope)

    def read_window(self, config: ConfigFields, layers: int) -> dict[str, Any]:
        """Return the spec fields of sliding windows. Raise `SpecError` if layers have one that the class lacks."""
        if SLIDING in (read_layer_types(config, layers) or ()):
            raise SpecError(f"config.json: layer_types = {SLIDING!r} is not supported for model_type {self.model_type}")
        return {}

    def read_rotary(self, config: ConfigFields) -> dict[str, Any]:
        """Return the spec fields of the rotary embedding."""
        return read_rope(config)

    def read_own(self, config: ConfigFields) -> dict[str, Any]:
        """Return the spec fields that descendants set differently."""
        return {**read_attention_bias(config), "mlp_bias": config.flag("mlp_bias", False)}

    def write_own(self, spec: ModelSpec) -> Config:
        """Return the config fields that only some descendants have."""
        return {
            "head_dim": spec.size_per_head,
            "attention_bias": spec.attention_output_bias,
            "mlp_bias": spec.mlp_bias,
        }


def read_attention_bias(config: ConfigFields) -> dict[str, Any]:
    """Return the spec's attention biases if a single field sets them all."""
    biased = config.flag("attention_bias", False)
    return {"qkv_bias": biased, "attention_output_bias": biased}


def given_head_dim(spec: ModelSpec) -> Config:
    """Return the head size as a config field if it does not follow from the other sizes."""
    return {} if spec.head_dim is None else {"head_dim": spec.head_dim}
