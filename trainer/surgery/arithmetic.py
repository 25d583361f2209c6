"""Task vectors: the change that training made to a model, applicable to other models (Ilharco et al., 2023)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.surgery.weights import Array, Derivation, Model, require_same, write

VECTOR = "is a difference"
"""Setting that marks a checkpoint as the difference of two models rather than a model."""


def difference(one: Model, base: Model, destination: Path) -> dict[str, Any]:
    """Write the change made by training, `one - base` in float32: a task vector, which is not a model itself."""
    for model in (one, base):
        _require_model(model)
    return _combine((one, base), (1.0, -1.0), destination, "F32", "subtracted", {VECTOR: True})


def add(
    base: Model, vectors: Sequence[Model], scales: Sequence[float], destination: Path, dtype: str | None
) -> dict[str, Any]:
    """Write `base` plus the sum of `scales` times differences; a negative scale removes the task."""
    _require_model(base)
    if len(vectors) != len(scales):
        raise SpecError(f"--scales gives {len(scales)} numbers for {len(vectors)} differences")
    for vector in vectors:
        if not _is_vector(vector):
            raise CheckpointError(
                f"{vector.native.path}: is a model, not a difference of two: make one with `difference`"
            )
    return _combine(
        (base, *vectors), (1.0, *scales), destination, dtype, "added differences to", {"scales": list(scales)}
    )


def _combine(
    models: Sequence[Model],
    weights: Sequence[float],
    destination: Path,
    dtype: str | None,
    made_by: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    require_same(models)

    def make(name: str) -> Array:
        total = models[0].read(name) * np.float64(weights[0])
        for model, weight in zip(models[1:], weights[1:], strict=True):
            total += model.read(name) * np.float64(weight)
        return total.astype(np.float32)

    first = models[0]
    return write(
        destination,
        first.spec,
        make,
        Derivation(parents=models, made_by=made_by, settings=settings),
        dtype=lambda name: dtype or first.dtype(name),
    )


def _is_vector(model: Model) -> bool:
    return bool((model.native.manifest.meta.get("settings") or {}).get(VECTOR))


def _require_model(model: Model) -> None:
    if _is_vector(model):
        raise CheckpointError(f"{model.native.path}: is the difference of two models: put it onto one with `add`")
