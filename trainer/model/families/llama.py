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
from keepwarm.trainer.model.families.config_fields import ConfigFields, shown
from keepwarm.trainer.model.families.rope_config import add_rope, read_rope
from keepwarm.trainer.model.families.tensor_names import TensorNames
from keepwarm.trainer.model.spec import ModelSpec


class LlamaFamily(ModelFamily):
    """Llama 1 to 3. A descendant overrides the defaults, `read_own` and `write_own`."""

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
    default_window: ClassVar[int | None] = None

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
            "sliding_window": self.read_window(config),
            **self.read_own(config),
            **read_rope(config),
            **read_shared(config, tied=False),
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
        return add_rope(config, old=rope, parameters=rope)

    def read_window(self, config: ConfigFields) -> int | None:
        """Return the sliding window of all layers, or None."""
        window = config.take_nullable("sliding_window", self.default_window)
        return None if layer_type(config) == "full_attention" else window

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


def layer_type(config: ConfigFields) -> str | None:
    """Return the common type of all layers if `layer_types` is set. Raise `SpecError` if the types differ."""
    types = config.take("layer_types", [])
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise SpecError(f"config.json: layer_types = {shown(types)} is not a list of names")
    types = set(types)
    if not types <= {"full_attention", "sliding_attention"} or len(types) > 1:
        raise SpecError(f"config.json: layer_types = {sorted(types)} is not supported: all layers must be of one type")
    return next(iter(types), None)


def given_head_dim(spec: ModelSpec) -> Config:
    """Return the head size as a config field if it does not follow from the other sizes."""
    return {} if spec.head_dim is None else {"head_dim": spec.head_dim}
