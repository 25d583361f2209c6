"""Qwen3: Qwen2 with a norm on every query and key head, and without biases. Torch-free."""

from typing import Any

from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.llama import read_attention_bias
from keepwarm.trainer.model.families.qwen2 import Qwen2Family, write_window
from keepwarm.trainer.model.spec import ModelSpec


class Qwen3Family(Qwen2Family):
    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"
    default_head_dim = 128

    def read_own(self, config: ConfigFields) -> dict[str, Any]:
        return {**read_attention_bias(config), "qk_norm": "head"}

    def write_own(self, spec: ModelSpec) -> Config:
        own = {"head_dim": spec.size_per_head, "attention_bias": spec.attention_output_bias}
        return own | write_window(spec)
