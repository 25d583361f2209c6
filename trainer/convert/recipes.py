"""The origin of every element of a converted tensor: runs of elements of source tensors, and nothing else. Pure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from keepwarm.trainer.model.huggingface_names import FAMILIES, PROJECTIONS, Family, is_fused, projection, their_name
from keepwarm.trainer.model.shapes import parameter_shapes
from keepwarm.trainer.model.spec import ModelSpec

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


def into_canonical(spec: ModelSpec, model_type: str) -> list[Recipe]:
    """Return recipes for all parameters from the tensors of a Hugging Face class; sources are named by `their_name`."""
    family = FAMILIES[model_type]
    made = []
    for name, shape in parameter_shapes(spec).items():
        theirs, turned = their_name(name, family), _is_turned(name, shape, family)
        runs = tuple((theirs, start, stop) for start, stop in _own_runs(name, shape, family, spec, turned))
        made.append(Recipe(name=name, shape=shape, runs=runs, turned=turned))
    return made


def into_huggingface(spec: ModelSpec, model_type: str) -> list[Recipe]:
    """Return the inverse recipes: the tensors of a Hugging Face class from canonical parameters."""
    family, shapes = FAMILIES[model_type], parameter_shapes(spec)
    made = []
    for name, shape in shapes.items():
        theirs, turned = their_name(name, family), _is_turned(name, shape, family)
        runs: tuple[tuple[str, int, int], ...] = ((name, 0, math.prod(shape)),)
        if is_fused(name, family):
            if projection(name) != 0:
                continue
            names = [name.replace(PROJECTIONS[0], other) for other in PROJECTIONS]
            shape = (3 * shape[0], *shape[1:])
            runs = tuple(_in_turns(names, math.prod(shapes[name]), family, spec))
        made.append(Recipe(name=theirs, shape=shape[::-1] if turned else shape, runs=runs, turned=turned))
    return made


def source_shapes(spec: ModelSpec, model_type: str) -> dict[str, Shape]:
    """Return the tensors in a Hugging Face file of this model."""
    return {recipe.name: recipe.shape for recipe in into_huggingface(spec, model_type)}


def _is_turned(name: str, shape: Shape, family: Family) -> bool:
    return family.transposed and name.startswith("layers.") and len(shape) == 2


def _own_runs(name: str, shape: Shape, family: Family, spec: ModelSpec, turned: bool) -> Iterator[tuple[int, int]]:
    """Yield the element ranges of one parameter within the tensor that holds it."""
    elements, at = math.prod(shape), projection(name)
    if not is_fused(name, family) or at is None:
        yield 0, elements
    elif turned:
        # Rows are inputs; each contains queries, keys and values side by side.
        outputs, inputs = shape
        for row in range(inputs):
            yield (3 * row + at) * outputs, (3 * row + at + 1) * outputs
    elif family.fused == "blocks":
        yield at * elements, (at + 1) * elements
    else:
        head = elements // spec.heads
        for index in range(spec.heads):
            yield (3 * index + at) * head, (3 * index + at + 1) * head


def _in_turns(names: list[str], elements: int, family: Family, spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Yield queries, keys and values in their order in a fused tensor."""
    parts = 1 if family.fused == "blocks" else spec.heads
    each = elements // parts
    for index in range(parts):
        for name in names:
            yield name, index * each, (index + 1) * each
