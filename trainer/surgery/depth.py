"""Change the number of layers: pruning, stacking (Gong et al., 2019; bert2BERT), function-preserving growth."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.shapes import split_layer
from keepwarm.trainer.surgery.weights import Array, Derivation, Model, write

How = Literal["identity", "stack", "repeat"]


def keep_layers(model: Model, kept: Sequence[int], destination: Path) -> dict[str, Any]:
    """Write the model with only the layers `kept`, in that order and renumbered.

    Raises:
        SpecError: a layer that is not there, or twice.
    """
    wrong = [index for index in kept if not 0 <= index < model.spec.layers]
    if wrong or not kept or len(set(kept)) < len(kept):
        raise SpecError(f"--keep {list(kept)}: each must be one of the layers 0 to {model.spec.layers - 1}, once")
    return _from_layers(model, list(kept), set(), destination, "pruned", {"kept": list(kept)})


def grow_depth(model: Model, layers: int, how: How, destination: Path) -> dict[str, Any]:
    """Write the model with more layers.

    - identity: copies spread among the old layers whose outputs are zero, so that the function stays (LLaMA Pro).
    - stack: all layers again and again, as bert2BERT stacks.
    - repeat: every layer several times in a row.

    Raises:
        SpecError: fewer layers than there are, or, but for identity, no multiple of them.
    """
    old = model.spec.layers
    if layers <= old:
        raise SpecError(f"--layers {layers}: the model has {old} already; `prune` makes it smaller")
    if how != "identity" and layers % old:
        raise SpecError(f"--layers {layers}: {how} needs a multiple of the {old} layers")
    silent: set[int] = set()
    if how == "stack":
        sources = [index % old for index in range(layers)]
    elif how == "repeat":
        sources = [index // (layers // old) for index in range(layers)]
    else:
        sources = [index * old // layers for index in range(layers)]
        silent = {index for index in range(1, layers) if sources[index] == sources[index - 1]}
    return _from_layers(model, sources, silent, destination, "deepened", {"layers": layers, "how": how})


def coalesce_depth(model: Model, layers: int, destination: Path) -> dict[str, Any]:
    """Each layer the mean of neighbours: undoes `repeat`, as in the V-cycle of Zou et al. (2024).

    Raises:
        SpecError: the layers are no multiple of `layers`.
    """
    times, rest = divmod(model.spec.layers, layers)
    if rest or times < 2:
        raise SpecError(f"--layers {layers}: the {model.spec.layers} layers are no multiple of it")
    spec = model.spec.of_layers(range(0, model.spec.layers, times))
    if spec.of_layers([index // times for index in range(model.spec.layers)]) != model.spec:
        raise SpecError(f"--layers {layers}: it would average layers with and without a window or rotary positions")

    def make(name: str) -> Array:
        index, inside = split_layer(name)
        if index is None:
            return model.read(name)
        every = [model.read(f"layers.{int(index) * times + at}.{inside}") for at in range(times)]
        return np.asarray(np.mean(every, axis=0, dtype=np.float64), np.float32)

    return write(
        destination,
        spec,
        make,
        Derivation(parents=[model], made_by="coalesced", settings={"layers": layers}),
        dtype=lambda name: model.dtype(_in(name, 0)),
    )


def parse_layers(text: str) -> list[int]:
    """`0-3,6` to `[0, 1, 2, 3, 6]`. Raises `SpecError`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise SpecError(f"--keep {text}: write layers as 0-3,6")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _in(name: str, index: int) -> str:
    """The same parameter of another layer."""
    found, inside = split_layer(name)
    return name if found is None else f"layers.{index}.{inside}"


def _from_layers(
    model: Model, sources: list[int], silent: set[int], destination: Path, made_by: str, settings: dict[str, Any]
) -> dict[str, Any]:
    # What a layer adds to the residual stream ends in these: zero there, and it adds nothing.
    last = (
        ("attention_norm.", "mlp_norm.") if model.spec.norm_position == "post" else ("attention.output.", "mlp.down.")
    )

    def source(name: str) -> str:
        index, _ = split_layer(name)
        return name if index is None else _in(name, sources[int(index)])

    def make(name: str) -> Array:
        values = model.read(source(name))
        index, inside = split_layer(name)
        if index is not None and int(index) in silent and inside.startswith(last):
            values = np.zeros_like(values)
        return values

    return write(
        destination,
        model.spec.of_layers(sources),
        make,
        Derivation(parents=[model], made_by=made_by, settings=settings),
        dtype=lambda name: model.dtype(source(name)),
    )
