"""OLMo 2: Llama with norms after attention and MLP, and a norm over all query or key heads together. Torch-free."""

import dataclasses
from typing import Any

from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.llama import LlamaFamily, given_head_dim, read_attention_bias
from keepwarm.trainer.model.spec import ModelSpec


class Olmo2Family(LlamaFamily):
    model_type = "olmo2"
    class_name = "Olmo2ForCausalLM"
    tensors = dataclasses.replace(
        LlamaFamily.tensors,
        inside={
            **LlamaFamily.tensors.inside,
            "attention_norm": "post_attention_layernorm",
            "mlp_norm": "post_feedforward_layernorm",
        },
    )
    default_norm_eps = 1e-5

    def read_own(self, config: ConfigFields) -> dict[str, Any]:
        return {**read_attention_bias(config), "norm_position": "post", "qk_norm": "projection"}

    def write_own(self, spec: ModelSpec) -> Config:
        return {**given_head_dim(spec), "attention_bias": spec.attention_output_bias}
