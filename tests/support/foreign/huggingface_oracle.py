"""Canonical parameters out of a Hugging Face state by whole torch tensors: the oracle for conversion's recipes."""

from collections.abc import Mapping

import torch

from keepwarm.trainer.model.families.registry import family_of
from keepwarm.trainer.model.families.tensor_names import PROJECTIONS, TensorNames
from keepwarm.trainer.model.shapes import parameter_shapes, split_layer
from keepwarm.trainer.model.spec import ModelSpec


def rearranged(tensors: Mapping[str, torch.Tensor], model_type: str, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Canonical parameters; views of `tensors` where the layouts allow it."""
    names = family_of(model_type).tensors
    found: dict[str, torch.Tensor] = {}
    for name, shape in parameter_shapes(spec).items():
        theirs = names.name(name)
        if theirs not in tensors and name == "head.weight":
            theirs = f"{names.head_alias}.weight"
        found[name] = _unpack(tensors[theirs], name, names, spec)
        assert tuple(found[name].shape) == shape, name
    return found


def _unpack(tensor: torch.Tensor, name: str, names: TensorNames, spec: ModelSpec) -> torch.Tensor:
    if names.transposed and name.startswith("layers.") and tensor.ndim == 2:
        tensor = tensor.t()
    fusion = names.fusion(name)
    if fusion is None:
        return tensor
    at = PROJECTIONS.index(split_layer(name.rpartition(".")[0])[1])
    if fusion.order == "blocks":
        return tensor.chunk(3)[at]
    return tensor.view(spec.heads, 3, spec.size_per_head, *tensor.shape[1:])[:, at].flatten(0, 1)
