"""Projections that a class of transformers keeps in one matrix, taken apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from keepwarm.trainer.errors import SpecError

_QUERY, _KEY, _VALUE = "attention.query", "attention.key", "attention.value"


@dataclass(frozen=True, kw_only=True)
class Fused:
    """How one matrix holds several."""

    parts: tuple[str, ...]
    """Canonical names, in order."""
    per_head: bool = False
    """Whether the rows of each head stand together: its query, key and value."""
    groups: int = 1
    """Number of equal runs of rows, each with its share of every part."""
    attributes: Mapping[str, int] = field(default_factory=dict)
    """What the class's attention must be set to, to take the parts as `Joined` returns them."""

    def groups_for(self, heads: int) -> int:
        """Return the number of groups in a model with this number of heads."""
        return heads if self.per_head else self.groups


_EVERYWHERE: Mapping[str, Fused] = {
    "self_attn.qkv_proj": Fused(parts=(_QUERY, _KEY, _VALUE)),
    "mlp.gate_up_proj": Fused(parts=("mlp.gate", "mlp.up")),
}
_OF_TYPE: Mapping[str, Mapping[str, Fused]] = {
    "gpt_neox": {"attention.query_key_value": Fused(parts=(_QUERY, _KEY, _VALUE), per_head=True)},
    # It was trained with four parts of the model side by side; one part is the same with blocks as wide as all.
    "codegen": {"attn.qkv_proj": Fused(parts=(_QUERY, _VALUE, _KEY), groups=4, attributes={"mp_num": 1})},
}


def fused_modules(model_type: str) -> Mapping[str, Fused]:
    """Return the fused modules of a layer by their names in transformers."""
    return {**_EVERYWHERE, **_OF_TYPE.get(model_type, {})}


class Joined:
    """Computes a fused projection from its parts."""

    def __init__(self, parts: tuple[nn.Module, ...], width: int | None = None) -> None:
        """With a `width`, that many features of every part stand together."""
        self._parts, self._width = parts, width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        made = [part(x) for part in self._parts]
        if self._width is None:
            return torch.cat(made, dim=-1)
        return torch.cat([one.unflatten(-1, (-1, self._width)) for one in made], dim=-1).flatten(-2)


def take_apart(layer: nn.Module, name: str, fused: Fused, rows: Mapping[str, int], heads: int) -> None:
    """Replace a fused module by its parts; `rows` are those of queries, keys and values by canonical name."""
    owner, last = layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    whole: Any = owner._modules.pop(last)
    sizes = [rows.get(part, whole.out_features // len(fused.parts)) for part in fused.parts]
    if sum(sizes) != whole.out_features or any(size % fused.groups_for(heads) for size in sizes):
        raise SpecError(f"{name} has {whole.out_features} rows, its parts {sizes}")
    made = tuple(
        nn.Linear(whole.in_features, size, bias=whole.bias is not None, device=whole.weight.device) for size in sizes
    )
    for part, module in zip(fused.parts, made, strict=True):
        owner.add_module(part.rpartition(".")[2], module)
    owner.__dict__[last] = Joined(made, sizes[0] // heads if fused.per_head else None)
    for attribute, value in fused.attributes.items():
        setattr(owner, attribute, value)
