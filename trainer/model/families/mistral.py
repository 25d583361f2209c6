"""Mistral: Llama with a sliding window and no biases. Torch-free."""

from typing import Any

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.layer_types import FULL, SLIDING, read_layer_types, windows
from keepwarm.trainer.model.families.llama import LlamaFamily
from keepwarm.trainer.model.spec import ModelSpec


class MistralFamily(LlamaFamily):
    model_type = "mistral"
    class_name = "MistralForCausalLM"
    default_kv_heads = 8

    def read_window(self, config: ConfigFields, layers: int) -> dict[str, Any]:
        window = config.take_nullable("sliding_window", 4096)
        # The class gives the window to every layer, whatever types are listed.
        every = [FULL if window is None else SLIDING] * layers
        if (read_layer_types(config, layers) or every) != every:
            raise SpecError("config.json: layer_types contradicts sliding_window, which every layer of a mistral has")
        return windows(every, window)

    def read_own(self, config: ConfigFields) -> dict[str, Any]:
        return {}

    def write_own(self, spec: ModelSpec) -> Config:
        return {"head_dim": spec.size_per_head, "sliding_window": spec.sliding_window}
