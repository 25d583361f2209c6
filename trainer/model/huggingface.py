"""Parameter names and layouts of Hugging Face models, to and from canonical ones. Nothing is read or written here."""

from collections.abc import Iterator, Mapping

import torch

from trainer.errors import CheckpointError
from trainer.model.huggingface_names import BUFFERS, FAMILIES, PROJECTIONS, Family, is_fused, projection, their_name
from trainer.model.shapes import parameter_shapes
from trainer.model.spec import ModelSpec

Tensors = Mapping[str, torch.Tensor]


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
        theirs = their_name(name, family)
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
        if is_fused(name, family):
            if projection(name) == 0:
                made[their_name(name, family)] = _fuse(list(_siblings(tensors, name)), family, spec)
        else:
            made[their_name(name, family)] = _turned(tensors[name], name, family)
    return made


def _siblings(tensors: Tensors, query: str) -> Iterator[torch.Tensor]:
    for other in PROJECTIONS:
        yield tensors[query.replace(PROJECTIONS[0], other)]


def _turned(tensor: torch.Tensor, name: str, family: Family) -> torch.Tensor:
    """Between `[outputs, inputs]` and `[inputs, outputs]`, both ways."""
    inside = family.transposed and name.startswith("layers.") and tensor.ndim == 2
    return tensor.t() if inside else tensor


def _unpack(tensor: torch.Tensor, name: str, family: Family, spec: ModelSpec) -> torch.Tensor:
    tensor = _turned(tensor, name, family)
    if not is_fused(name, family):
        return tensor
    at = projection(name)
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
