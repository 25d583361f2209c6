"""Qwen2: Llama with biases on query, key and value, and an optional sliding window. Torch-free."""

from typing import Any

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.llama import LlamaFamily, given_head_dim, layer_type
from keepwarm.trainer.model.spec import ModelSpec


class Qwen2Family(LlamaFamily):
    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"
    default_kv_heads = 32

    def read_window(self, config: ConfigFields) -> int | None:
        """Return the sliding window of all layers, or None. Raise `SpecError` if only some layers have it."""
        window = config.take_nullable("sliding_window", None)
        if not config.take("use_sliding_window", False):
            window = None
        kind = layer_type(config)
        if kind is None and window is not None:
            # The first so many layers attend to everything.
            full = config.integer("max_window_layers", 28)
            if full >= config.integer("num_hidden_layers"):
                return None
            if full > 0:
                raise SpecError("config.json: max_window_layers is not supported: all layers must have one window")
        return None if kind == "full_attention" else window

    def read_own(self, config: ConfigFields) -> dict[str, Any]:
        config.harmless("attention_bias")
        return {"qkv_bias": True, "attention_output_bias": False}

    def write_own(self, spec: ModelSpec) -> Config:
        return given_head_dim(spec) | write_window(spec)


def write_window(spec: ModelSpec) -> Config:
    """Return the config fields that `Qwen2Family.read_window` reads."""
    windowed = spec.sliding_window is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": spec.sliding_window,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * spec.layers,
    }
