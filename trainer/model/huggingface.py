"""Parameter names and layouts of Hugging Face models, to and from canonical ones. Nothing is read or written here."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from trainer.errors import CheckpointError
from trainer.model.shapes import parameter_shapes
from trainer.model.spec import ModelSpec

Tensors = Mapping[str, torch.Tensor]

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


def from_huggingface(tensors: Tensors, model_type: str, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Canonical parameters out of a Hugging Face state; views of its tensors where the layouts allow it.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape than `spec` says; names it.
    """
    family = FAMILIES[model_type]
    found: dict[str, torch.Tensor] = {}
    used = {family.head_alias, family.top["head"]} if spec.tied_embeddings else set()
    used = {f"{module}.weight" for module in used}
    for name, shape in parameter_shapes(spec).items():
        theirs = _their_name(name, family)
        if theirs not in tensors and name == "head.weight":
            theirs = f"{family.head_alias}.weight"
        if theirs not in tensors:
            raise CheckpointError(f"{theirs} is missing, which holds {name}")
        used.add(theirs)
        tensor = _unpack(tensors[theirs], name, family, spec)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{theirs}: {name} is {tuple(tensor.shape)}, the model spec says {shape}")
        found[name] = tensor
    left = sorted(name for name in set(tensors) - used if not BUFFERS.search(name))
    if left:
        raise CheckpointError(f"{left[0]} has no place in the model ({len(left)} such tensors)")
    return found


def to_huggingface(tensors: Tensors, model_type: str, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The inverse of `from_huggingface`, under the names that files on disk have.

    Raises:
        CheckpointError: a parameter of `spec` is missing, or the class has no place for it; names it.
    """
    family = FAMILIES[model_type]
    made: dict[str, torch.Tensor] = {}
    for name in parameter_shapes(spec):
        if name not in tensors:
            raise CheckpointError(f"{name} is missing")
        if _is_fused(name, family):
            if _projection(name) == 0:
                made[_their_name(name, family)] = _fuse(list(_siblings(tensors, name)), family, spec)
        else:
            made[_their_name(name, family)] = _turned(tensors[name], name, family)
    return made


def _their_name(name: str, family: Family) -> str:
    module, _, kind = name.rpartition(".")
    index, inside = _split_layer(module)
    try:
        theirs = family.top[module] if index is None else family.layer.format(index) + family.inside[inside]
    except KeyError:
        raise CheckpointError(f"{name} has no place in a model of this type") from None
    return f"{theirs}.{kind}"


def _split_layer(module: str) -> tuple[str | None, str]:
    """`layers.3.mlp.up` to `("3", "mlp.up")`; index None outside the layers."""
    if not module.startswith("layers."):
        return None, module
    _, index, inside = module.split(".", 2)
    return index, inside


def _projection(name: str) -> int | None:
    inside = _split_layer(name.rpartition(".")[0])[1]
    return PROJECTIONS.index(inside) if inside in PROJECTIONS else None


def _is_fused(name: str, family: Family) -> bool:
    return family.fused != "no" and _projection(name) is not None


def _siblings(tensors: Tensors, query: str) -> Iterator[torch.Tensor]:
    for projection in PROJECTIONS:
        yield tensors[query.replace(PROJECTIONS[0], projection)]


def _turned(tensor: torch.Tensor, name: str, family: Family) -> torch.Tensor:
    """Between `[outputs, inputs]` and `[inputs, outputs]`, both ways."""
    inside = family.transposed and name.startswith("layers.") and tensor.ndim == 2
    return tensor.t() if inside else tensor


def _unpack(tensor: torch.Tensor, name: str, family: Family, spec: ModelSpec) -> torch.Tensor:
    tensor = _turned(tensor, name, family)
    if not _is_fused(name, family):
        return tensor
    at = _projection(name)
    assert at is not None
    if tensor.shape[0] != 3 * spec.heads * spec.size_per_head:
        return tensor
    if family.fused == "blocks":
        return tensor.chunk(3)[at]
    return tensor.view(spec.heads, 3, spec.size_per_head, *tensor.shape[1:])[:, at].flatten(0, 1)


def _fuse(parts: list[torch.Tensor], family: Family, spec: ModelSpec) -> torch.Tensor:
    if family.fused == "blocks":
        fused = torch.cat(parts)
    else:
        per_head = [part.reshape(spec.heads, spec.size_per_head, *part.shape[1:]) for part in parts]
        fused = torch.stack(per_head, dim=1).flatten(0, 2)
    return fused.t() if family.transposed and fused.ndim == 2 else fused
