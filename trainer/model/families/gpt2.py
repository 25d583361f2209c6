"""GPT-2: learned positions, biases everywhere, tied embeddings, transposed matrices. Torch-free."""

from typing import Any

from keepwarm.trainer.model.families.base import (
    PLAIN_ACTIVATIONS,
    Config,
    ModelFamily,
    plain_activation,
    read_shared,
    write_shared,
)
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.tensor_names import PROJECTIONS, Fusion, TensorNames
from keepwarm.trainer.model.spec import ModelSpec


class Gpt2Family(ModelFamily):
    model_type = "gpt2"
    class_name = "GPT2LMHeadModel"
    tensors = TensorNames(
        top={
            "embedding": "transformer.wte",
            "positions": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
        },
        layer="transformer.h.{}.",
        inside={
            "attention_norm": "ln_1",
            "attention.output": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        fusions=(Fusion(module="attn.c_attn", parts=PROJECTIONS),),
        transposed=True,
    )

    def read_config(self, config: ConfigFields) -> dict[str, Any]:
        config.harmless("resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn", "n_ctx")
        config.harmless(*(name for name in config if name.startswith("summary_")))
        config.require("scale_attn_weights", True)
        config.require("scale_attn_by_inverse_layer_idx", False)
        config.require("add_cross_attention", False)
        hidden = config.integer("n_embd")
        return {
            "layers": config.integer("n_layer"),
            "hidden_size": hidden,
            "heads": config.integer("n_head"),
            "ffn_size": config.integer("n_inner", 4 * hidden),
            "max_sequence_length": config.integer("n_positions"),
            "norm": "layer",
            "norm_eps": config.number("layer_norm_epsilon", 1e-5),
            "activation": config.choose("activation_function", "gelu_new", PLAIN_ACTIVATIONS),
            "position": "learned",
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            **read_shared(config, tied=True),
        }

    def write_config(self, spec: ModelSpec) -> Config:
        return {
            **write_shared(spec),
            "n_embd": spec.hidden_size,
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "n_inner": spec.ffn_size,
            "n_positions": spec.max_sequence_length,
            "activation_function": plain_activation(spec),
            "layer_norm_epsilon": spec.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
