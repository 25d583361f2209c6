"""Canonical names of the modules in transformers' layers, and fused projections taken apart.

Modules move to their canonical names; transformers' code goes on using its own, which remain as plain attributes.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.registry import FAMILIES, family_of
from keepwarm.trainer.model.norm import RMSNorm

_USUAL = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_ELSEWHERE = {
    "self_attn": "attention",
    "self_attn.q_a_proj": "attention.query_down",
    "self_attn.q_a_layernorm": "attention.query_down_norm",
    "self_attn.q_b_proj": "attention.query",
    "self_attn.kv_a_proj_with_mqa": "attention.key_value_down",
    "self_attn.kv_a_layernorm": "attention.key_value_down_norm",
    "self_attn.kv_b_proj": "attention.key_value",
    "self_attn.dense": "attention.output",
    "self_attn.q_layernorm": "attention.query_norm",
    "self_attn.k_layernorm": "attention.key_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
FUSED = {
    "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
    "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
}
"""Fused linear layers that are taken apart: their parts, one after the other."""


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Modules of a layer that have parameters: their names in transformers by canonical name."""

    inside: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts of each fused module of transformers."""


def canonical_modules(layer: nn.Module, model_type: str, heads: tuple[int, int]) -> LayerNames:
    """Rename the modules of a layer, take fused ones apart, and return the names.

    `heads` are the rows of the queries and of the keys. Names are those of the native family where there is one.
    """
    table = {theirs: ours for ours, theirs in _USUAL.items()} | _ELSEWHERE
    if model_type in FAMILIES:
        table |= {theirs: ours for ours, theirs in family_of(model_type).tensors.inside.items()}
    owners = [name for name, module in layer.named_modules() if name and module._parameters]
    fused = {name: FUSED[name] for name in owners if name in FUSED}
    inside = {_renamed(name, table): name for name in owners if name not in fused}
    if len(inside) + len(fused) != len(owners):
        raise SpecError(f"two modules of a layer would have the same canonical name: {sorted(owners)}")
    _share_norms(layer, heads)
    for name, parts in fused.items():
        _take_apart(layer, name, parts, heads)
    for ours, theirs in inside.items():
        _move(layer, theirs, ours)
    _alias(layer, "self_attn", "attention")
    return LayerNames(inside=inside, fused=fused)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    if name in table:
        return table[name]
    return name.replace("self_attn.", "attention.", 1) if name.startswith("self_attn.") else name


def _move(layer: nn.Module, theirs: str, ours: str) -> None:
    """Register the module under the last part of its canonical name; its old name stays an attribute."""
    owner = layer.get_submodule(theirs.rpartition(".")[0])
    _alias(owner, theirs.rpartition(".")[2], ours.rpartition(".")[2])


def _alias(owner: nn.Module, old: str, new: str) -> None:
    if old == new or old not in owner._modules:
        return
    owner._modules = {new if name == old else name: module for name, module in owner._modules.items()}
    owner.__dict__[old] = owner._modules[new]


def _share_norms(layer: nn.Module, heads: tuple[int, int]) -> None:
    """Replace norms of all queries or keys together by ours, whose features can be split over ranks."""
    for name, rows in (("q_norm", heads[0]), ("k_norm", heads[1])):
        attention = layer.get_submodule("self_attn")
        found = attention._modules.get(name)
        if found is not None and tuple(getattr(found, "weight", torch.empty(0)).shape) == (rows,) and _is_rms(found):
            with torch.device("meta"):
                attention._modules[name] = RMSNorm(rows, found.variance_epsilon)  # type: ignore[arg-type]


def _is_rms(norm: nn.Module) -> bool:
    """Return whether a norm computes what ours does, found by an example."""
    if [name for name, _ in norm.named_parameters()] != ["weight"] or not hasattr(norm, "variance_epsilon"):
        return False
    theirs: Any = copy.deepcopy(norm).to_empty(device="cpu")
    features = int(theirs.weight.shape[0])
    with torch.no_grad(), torch.device("cpu"):
        ours = RMSNorm(features, theirs.variance_epsilon)
        example = torch.linspace(-3, 2, 2 * features).view(2, features)
        for weight in (theirs.weight, ours.weight):
            weight.copy_(torch.linspace(0.5, 1.5, features))
        return torch.allclose(theirs(example), ours(example), rtol=1e-5, atol=1e-6)


class Joined:
    """Computes a fused projection from its parts."""

    def __init__(self, parts: tuple[nn.Module, ...]) -> None:
        self._parts = parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self._parts], dim=-1)


def _take_apart(layer: nn.Module, name: str, parts: tuple[str, ...], heads: tuple[int, int]) -> None:
    owner, last = layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    whole = owner._modules.pop(last)
    assert isinstance(whole, nn.Linear)
    rows = [heads[0], heads[1], heads[1]] if len(parts) == 3 else [whole.out_features // 2] * 2
    if sum(rows) != whole.out_features:
        raise SpecError(f"{name} has {whole.out_features} rows, its parts {rows}")
    made = tuple(
        nn.Linear(whole.in_features, size, bias=whole.bias is not None, device=whole.weight.device) for size in rows
    )
    for part, module in zip(parts, made, strict=True):
        owner.add_module(part.rpartition(".")[2], module)
    owner.__dict__[last] = Joined(made)
