"""What parameters are called in Hugging Face models, and how they lie there, by canonical name. Torch-free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from keepwarm.trainer.errors import CheckpointError

PROJECTIONS = ("attention.query", "attention.key", "attention.value")

BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias|attn\.bias|attn\.masked_bias)$")
"""Constants that older versions saved among the parameters."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a Hugging Face class names and lays out what has a canonical name here."""

    top: Mapping[str, str]
    """Modules outside the layers: canonical name to theirs."""
    layer: str
    """Prefix of a layer; `{}` is its index."""
    inside: Mapping[str, str]
    """Modules inside a layer: canonical name to theirs."""
    fused: Literal["no", "blocks", "heads"] = "no"
    """Query, key and value in one module: one after the other, or in turns for every head."""
    transposed: bool = False
    """Linear layers inside layers store `[inputs, outputs]`, as GPT-2's Conv1D does."""
    head_alias: str = "lm_head"
    """Another name under which the head may be found: GPT-NeoX has two."""


_LLAMA = Family(
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

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": Family(
        top=_LLAMA.top,
        layer=_LLAMA.layer,
        inside={
            **_LLAMA.inside,
            "attention_norm": "post_attention_layernorm",
            "mlp_norm": "post_feedforward_layernorm",
        },
    ),
    "gpt_neox": Family(
        top={"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
        layer="gpt_neox.layers.{}.",
        inside={
            "attention_norm": "input_layernorm",
            **dict.fromkeys(PROJECTIONS, "attention.query_key_value"),
            "attention.output": "attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        fused="heads",
    ),
    "gpt2": Family(
        top={
            "embedding": "transformer.wte",
            "positions": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
        },
        layer="transformer.h.{}.",
        inside={
            "attention_norm": "ln_1",
            **dict.fromkeys(PROJECTIONS, "attn.c_attn"),
            "attention.output": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        fused="blocks",
        transposed=True,
    ),
}
"""By `model_type`."""


def their_name(name: str, family: Family) -> str:
    """The tensor that holds a canonical parameter. Raises `CheckpointError` when the class has no place for it."""
    module, _, kind = name.rpartition(".")
    index, inside = split_layer(module)
    try:
        theirs = family.top[module] if index is None else family.layer.format(index) + family.inside[inside]
    except KeyError:
        raise CheckpointError(f"{name} has no place in a model of this type") from None
    return f"{theirs}.{kind}"


def split_layer(module: str) -> tuple[str | None, str]:
    """`layers.3.mlp.up` to `("3", "mlp.up")`; index None outside the layers."""
    if not module.startswith("layers."):
        return None, module
    _, index, inside = module.split(".", 2)
    return index, inside


def projection(name: str) -> int | None:
    """0, 1 or 2 for parameters of query, key and value."""
    inside = split_layer(name.rpartition(".")[0])[1]
    return PROJECTIONS.index(inside) if inside in PROJECTIONS else None


def is_fused(name: str, family: Family) -> bool:
    """Whether their tensor holds query, key and value together."""
    return family.fused != "no" and projection(name) is not None
