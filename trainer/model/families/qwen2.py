"""Qwen2: Llama with biases on query, key and value, and an optional sliding window. Torch-free."""

from typing import Any

from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.layer_types import FULL, SLIDING, read_layer_types, windows, write_layer_types
from keepwarm.trainer.model.families.llama import LlamaFamily, given_head_dim
from keepwarm.trainer.model.spec import ModelSpec


class Qwen2Family(LlamaFamily):
    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"
    default_kv_heads = 32

    def read_window(self, config: ConfigFields, layers: int) -> dict[str, Any]:
        window = config.take_nullable("sliding_window", 4096)
        if not config.flag("use_sliding_window", False):
            window = None
        # The first so many layers attend to everything.
        first = config.integer("max_window_layers", 28)
        derived = [FULL if window is None or index < first else SLIDING for index in range(layers)]
        return windows(read_layer_types(config, layers) or derived, window)

    def read_own(self, config: ConfigFields) -> dict[str, Any]:
        config.harmless("attention_bias")
        return {"qkv_bias": True, "attention_output_bias": False}

    def write_own(self, spec: ModelSpec) -> Config:
        return given_head_dim(spec) | write_window(spec)


def write_window(spec: ModelSpec) -> Config:
    """Return the config fields that `Qwen2Family.read_window` reads."""
    types = write_layer_types(spec)
    first = next((index for index, kind in enumerate(types["layer_types"]) if kind == SLIDING), spec.layers)
    windowed = spec.sliding_window is not None
    return types | {"use_sliding_window": windowed, "max_window_layers": first if windowed else 0}
