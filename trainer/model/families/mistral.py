"""Mistral: Llama with a sliding window and no biases. Torch-free."""

from typing import Any

from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.llama import LlamaFamily
from keepwarm.trainer.model.spec import ModelSpec


class MistralFamily(LlamaFamily):
    model_type = "mistral"
    class_name = "MistralForCausalLM"
    default_kv_heads = 8
    default_window = 4096

    def read_own(self, config: ConfigFields) -> dict[str, Any]:
        return {}

    def write_own(self, spec: ModelSpec) -> Config:
        return {"head_dim": spec.size_per_head, "sliding_window": spec.sliding_window}
