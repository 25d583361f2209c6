"""GPT-NeoX (Pythia): parallel attention and MLP; rotary embeddings cover part of each head. Torch-free."""

from typing import Any

from keepwarm.trainer.model.families.base import (
    PLAIN_ACTIVATIONS,
    Config,
    ModelFamily,
    plain_activation,
    read_shared,
    read_sizes,
    write_shared,
    write_sizes,
)
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.rope_config import add_rope, read_rope
from keepwarm.trainer.model.families.tensor_names import PROJECTIONS, Fusion, TensorNames
from keepwarm.trainer.model.spec import ModelSpec


class GptNeoxFamily(ModelFamily):
    model_type = "gpt_neox"
    class_name = "GPTNeoXForCausalLM"
    tensors = TensorNames(
        top={"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
        layer="gpt_neox.layers.{}.",
        inside={
            "attention_norm": "input_layernorm",
            "attention.output": "attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        fusions=(Fusion(module="attention.query_key_value", parts=PROJECTIONS, order="groups"),),
        head_alias="lm_head",
    )

    def read_config(self, config: ConfigFields) -> dict[str, Any]:
        config.harmless("attention_dropout", "hidden_dropout", "classifier_dropout")
        biased = config.flag("attention_bias", True)
        # Later versions of transformers 4 write the two rotary fields a second time, under these names.
        rope = read_rope(config, theta="rotary_emb_base", fraction="rotary_pct")
        config.require("rope_theta", rope["rope_theta"])
        config.require("partial_rotary_factor", rope["rotary_fraction"])
        return {
            **read_sizes(config),
            "norm": "layer",
            "norm_eps": config.number("layer_norm_eps", 1e-5),
            "activation": config.choose("hidden_act", "gelu", PLAIN_ACTIVATIONS),
            "parallel_residual": config.flag("use_parallel_residual", True),
            "qkv_bias": biased,
            "attention_output_bias": biased,
            "mlp_bias": True,
            **rope,
            **read_shared(config, tied=False),
        }

    def write_config(self, spec: ModelSpec) -> Config:
        return {
            **write_shared(spec),
            **write_sizes(spec),
            "attention_dropout": 0.0,
            "hidden_act": plain_activation(spec),
            "hidden_dropout": 0.0,
            "layer_norm_eps": spec.norm_eps,
            "use_parallel_residual": spec.parallel_residual,
            "attention_bias": spec.attention_output_bias,
        }

    def in_both_dialects(self, config: Config, spec: ModelSpec) -> Config:
        return add_rope(
            config,
            spec,
            old={"rotary_emb_base": spec.rope_theta, "rotary_pct": spec.rotary_fraction},
            parameters={"rope_theta": spec.rope_theta, "partial_rotary_factor": spec.rotary_fraction},
        )
