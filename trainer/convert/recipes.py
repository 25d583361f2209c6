"""The origin of every element of a converted tensor: runs of elements of source tensors, and nothing else. Pure."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.families.registry import family_of
from keepwarm.trainer.model.families.tensor_names import Fusion, TensorNames
from keepwarm.trainer.model.shapes import stored_shapes
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.model.transformers.tensors import tensor_names

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One tensor to build from `runs` (source, first element, last element + 1), concatenated.

    With `turned`, the runs give a matrix of the reversed shape, and the tensor is its transpose.
    """

    name: str
    shape: Shape
    runs: tuple[tuple[str, int, int], ...]
    turned: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def names_of(spec: AnyModelSpec, model_type: str) -> TensorNames:
    """Return the names of a model's tensors in a folder of transformers of this type.

    Raises:
        SpecError: no family is registered under it.
    """
    return family_of(model_type).tensors if isinstance(spec, ModelSpec) else tensor_names(spec)


def into_canonical(spec: AnyModelSpec, model_type: str) -> list[Recipe]:
    """Return all parameters of a model out of the tensors of a Hugging Face class; sources have the class's names."""
    names, shapes = names_of(spec, model_type), stored_shapes(spec)
    made = []
    for name, shape in shapes.items():
        turned, fusion = names.is_transposed(name, len(shape)), names.fusion(name)
        runs = [(0, math.prod(shape))] if fusion is None else _own_runs(name, fusion, shapes, spec, turned)
        theirs = names.name(name)
        taken = tuple((theirs, start, stop) for start, stop in runs)
        made.append(Recipe(name=name, shape=shape, runs=taken, turned=turned))
    return made


def into_huggingface(spec: AnyModelSpec, model_type: str) -> list[Recipe]:
    """Return the inverse: the tensors of a Hugging Face class out of canonical parameters."""
    names, shapes = names_of(spec, model_type), stored_shapes(spec)
    made = []
    for name, shape in shapes.items():
        turned, fusion = names.is_transposed(name, len(shape)), names.fusion(name)
        runs: tuple[tuple[str, int, int], ...] = ((name, 0, math.prod(shape)),)
        if fusion is not None:
            parts = _part_rows(name, fusion, shapes)
            if name != next(iter(parts)):
                continue
            width = math.prod(shape[1:])
            shape = (sum(parts.values()), *shape[1:])
            runs = tuple((part, start * width, stop * width) for part, start, stop in _rows(parts, fusion, spec))
        made.append(Recipe(name=names.name(name), shape=shape[::-1] if turned else shape, runs=runs, turned=turned))
    return made


def source_shapes(spec: AnyModelSpec, model_type: str) -> dict[str, Shape]:
    """Return the tensors that a Hugging Face file of this model holds."""
    return {recipe.name: recipe.shape for recipe in into_huggingface(spec, model_type)}


def _part_rows(name: str, fusion: Fusion, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the parameters that share a fused tensor with `name`, in its order, with their rows."""
    module, _, kind = name.rpartition(".")
    prefix = module.removesuffix(next(part for part in fusion.parts if module.endswith(f".{part}")))
    names = [f"{prefix}{part}.{kind}" for part in fusion.parts]
    return {name: shapes[name][0] for name in names if name in shapes}


def _rows(parts: Mapping[str, int], fusion: Fusion, spec: AnyModelSpec) -> Iterator[tuple[str, int, int]]:
    """Yield (parameter, first row, last row + 1) in the order in which a fused tensor has them."""
    groups = (fusion.groups or spec.key_value_heads) if fusion.order == "groups" else 1
    for index in range(groups):
        for name, rows in parts.items():
            each = rows // groups
            yield name, index * each, (index + 1) * each


def _own_runs(
    name: str, fusion: Fusion, shapes: Mapping[str, Shape], spec: AnyModelSpec, turned: bool
) -> Iterator[tuple[int, int]]:
    """Yield the elements of one parameter within the fused tensor that holds it."""
    parts, width = _part_rows(name, fusion, shapes), math.prod(shapes[name][1:])
    own, at = [], 0
    for part, start, stop in _rows(parts, fusion, spec):
        if part == name:
            own.append((at, at + stop - start))
        at += stop - start
    if not turned:
        yield from ((start * width, stop * width) for start, stop in own)
        return
    # Their rows are inputs; the outputs of all parts stand side by side in each.
    for row in range(width):
        yield from ((row * at + start, row * at + stop) for start, stop in own)
