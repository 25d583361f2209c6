"""Canonical parameters out of a Hugging Face state by whole torch tensors: the oracle for conversion's recipes."""

from collections.abc import Mapping

import torch

from keepwarm.trainer.model.huggingface_names import FAMILIES, Family, is_fused, projection, their_name
from keepwarm.trainer.model.shapes import parameter_shapes
from keepwarm.trainer.model.spec import ModelSpec


def rearranged(tensors: Mapping[str, torch.Tensor], model_type: str, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Canonical parameters; views of `tensors` where the layouts allow it."""
    family = FAMILIES[model_type]
    found: dict[str, torch.Tensor] = {}
    for name, shape in parameter_shapes(spec).items():
        theirs = their_name(name, family)
        if theirs not in tensors and name == "head.weight":
            theirs = f"{family.head_alias}.weight"
        found[name] = _unpack(tensors[theirs], name, family, spec)
        assert tuple(found[name].shape) == shape, name
    return found


def _unpack(tensor: torch.Tensor, name: str, family: Family, spec: ModelSpec) -> torch.Tensor:
    if family.transposed and name.startswith("layers.") and tensor.ndim == 2:
        tensor = tensor.t()
    if not is_fused(name, family):
        return tensor
    at = projection(name)
    assert at is not None
    if family.fused == "blocks":
        return tensor.chunk(3)[at]
    return tensor.view(spec.heads, 3, spec.size_per_head, *tensor.shape[1:])[:, at].flatten(0, 1)
