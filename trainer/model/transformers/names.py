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
from keepwarm.trainer.model.families.tensor_names import PROJECTIONS
from keepwarm.trainer.model.norm import RMSNorm
from keepwarm.trainer.model.transformers.fused import fused_modules, take_apart
from keepwarm.trainer.model.transformers.usual import attention_of

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
    "self_attn.out_proj": "attention.output",
    "self_attn.q_layernorm": "attention.query_norm",
    "self_attn.k_layernorm": "attention.key_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
    "mlp.fc_in": "mlp.up",
    "mlp.fc_out": "mlp.down",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Modules of a layer that have parameters: their names in transformers by canonical name."""

    inside: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts of each fused module of transformers."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Number of groups in which each fused module has the rows of its parts."""


def canonical_modules(layer: nn.Module, model_type: str, heads: tuple[int, int], count: int) -> LayerNames:
    """Rename the modules of a layer, take fused ones apart, and return the names.

    `heads` are the rows of the queries and of the keys, `count` the number of heads. Names are those of the native
    family where there is one.
    """
    table = {theirs: ours for ours, theirs in _USUAL.items()} | _ELSEWHERE
    if model_type in FAMILIES:
        table |= {theirs: ours for ours, theirs in family_of(model_type).tensors.inside.items()}
    attention, known = attention_of(layer) or "", fused_modules(model_type)
    owners = [name for name, module in layer.named_modules() if (name and module._parameters) or module._buffers]
    fused = {name: known[name] for name in owners if name in known}
    inside = {_renamed(name, table, attention): name for name in owners if name not in fused}
    if len(inside) + len(fused) != len(owners):
        raise SpecError(f"two modules of a layer would have the same canonical name: {sorted(owners)}")
    _share_norms(layer.get_submodule(attention), heads)
    rows = dict(zip(PROJECTIONS, (heads[0], heads[1], heads[1]), strict=True))
    for name, how in fused.items():
        take_apart(layer, name, how, rows, count)
    for ours, theirs in inside.items():
        _move(layer, theirs, ours)
    _alias(layer, attention, "attention")
    groups = {name: how.groups_for(count) for name, how in fused.items() if how.groups_for(count) > 1}
    return LayerNames(inside=inside, fused={name: how.parts for name, how in fused.items()}, groups=groups)


def _renamed(name: str, table: Mapping[str, str], attention: str) -> str:
    if name in table:
        return table[name]
    if not name.startswith(f"{attention}."):
        return name
    inside = name.removeprefix(f"{attention}.")
    return table.get(f"self_attn.{inside}", f"attention.{inside}")


def _move(layer: nn.Module, theirs: str, ours: str) -> None:
    """Register the module under the last part of its canonical name; its old name stays an attribute."""
    owner = layer.get_submodule(theirs.rpartition(".")[0])
    _alias(owner, theirs.rpartition(".")[2], ours.rpartition(".")[2])


def _alias(owner: nn.Module, old: str, new: str) -> None:
    if old == new or old not in owner._modules:
        return
    owner._modules = {new if name == old else name: module for name, module in owner._modules.items()}
    owner.__dict__[old] = owner._modules[new]


def _share_norms(attention: nn.Module, heads: tuple[int, int]) -> None:
    """Replace norms of all queries or keys together by ours, whose features can be split over ranks."""
    for name, rows in (("q_norm", heads[0]), ("k_norm", heads[1])):
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
        found = theirs(example)
        return torch.allclose(found, ours(example).to(found.dtype), rtol=1e-5, atol=1e-6)
