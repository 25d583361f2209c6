"""Widen models, preserving the function (bert2BERT, Chen et al., 2021: FPI) or a better start (AKI), and reverse it.

Every unit of the wide model is a copy of a unit of the narrow one. Rows that produce a copied unit are copied; columns
that read it are copied and divided by the number of copies, so that their sum is unchanged. Norms average over all
units, which is unchanged only if every unit has equally many copies. The hidden size therefore grows by whole factors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.shapes import split_layer
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.surgery.weights import Array, Derivation, Model, write

Units = Literal["hidden", "queries", "keys", "ffn"]
Index = npt.NDArray[np.int64]

_ROLES: dict[str, tuple[tuple[Units, bool] | None, ...]] = {
    "embedding.weight": (None, ("hidden", False)),
    "positions.weight": (None, ("hidden", False)),
    "head.weight": (None, ("hidden", True)),
    "attention.query": (("queries", False), ("hidden", True)),
    "attention.key": (("keys", False), ("hidden", True)),
    "attention.value": (("keys", False), ("hidden", True)),
    "attention.output": (("hidden", False), ("queries", True)),
    "mlp.gate": (("ffn", False), ("hidden", True)),
    "mlp.up": (("ffn", False), ("hidden", True)),
    "mlp.down": (("hidden", False), ("ffn", True)),
}
"""The units that each dimension stands for, and whether it reads them."""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of the wide model; None leaves a size unchanged."""

    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    """Grouped keys and values grow with their queries."""


def grow_width(model: Model, widths: Widths, how: Literal["fpi", "aki"], destination: Path) -> dict[str, Any]:
    """Write the wide model. With `aki`, new units are taken from the layer above, which changes the function.

    Raises:
        SpecError: a size shrinks, or cannot be grown to without changing the function; names it.
    """
    narrow = model.spec
    wide, copies = _plan(narrow, widths)

    def make(name: str) -> Array:
        index, inside = split_layer(name)
        values = model.read(name)
        roles = _roles(inside, narrow)
        above = None
        if how == "aki" and index is not None and int(index) + 1 < narrow.layers:
            above = model.read(f"layers.{int(index) + 1}.{inside}")
        grown = _grow(values, above, roles, copies)
        return grown / _final_scale(name, narrow, copies)

    return write(
        destination,
        wide,
        make,
        Derivation(
            parents=[model],
            made_by="widened",
            settings={"how": how, "hidden": wide.hidden_size, "ffn": wide.ffn_size, "heads": wide.heads},
        ),
        dtype=model.dtype,
    )


def coalesce_width(model: Model, widths: Widths, destination: Path) -> dict[str, Any]:
    """Write the narrow model with sizes `widths`: means of the copied rows, sums of their columns.

    Undoes `grow_width` exactly; any other model it merges in the same way (Zou et al., 2024).

    Raises:
        SpecError: the model does not divide into such groups; names the size.
    """
    wide = model.spec
    narrow = wide.model_copy(
        update={
            "hidden_size": widths.hidden or wide.hidden_size,
            "ffn_size": widths.ffn or wide.ffn_size,
            "heads": widths.heads or wide.heads,
            "kv_heads": wide.key_value_heads * (widths.heads or wide.heads) // wide.heads,
            "head_dim": wide.size_per_head,
        }
    )
    again, copies = _plan(narrow, Widths(hidden=wide.hidden_size, ffn=wide.ffn_size, heads=wide.heads))
    if again.key_value_heads != wide.key_value_heads:
        raise SpecError(f"--heads {widths.heads}: kv_heads = {wide.key_value_heads} do not divide with the heads")

    def make(name: str) -> Array:
        values = model.read(name).astype(np.float64)
        for dim, role in enumerate(_roles(split_layer(name)[1], narrow)):
            if role is not None:
                units, reads = role
                values = _merge(values, dim, copies[units], reads)
        return (values * _final_scale(name, narrow, copies)).astype(np.float32)

    return write(
        destination,
        narrow,
        make,
        Derivation(
            parents=[model],
            made_by="coalesced",
            settings={"hidden": narrow.hidden_size, "ffn": narrow.ffn_size, "heads": narrow.heads},
        ),
        dtype=model.dtype,
    )


def _plan(narrow: ModelSpec, widths: Widths) -> tuple[ModelSpec, dict[Units, Index]]:
    """Return the wide spec, and for all units of each kind the narrow unit that each copies."""
    hidden, ffn, heads = (
        widths.hidden or narrow.hidden_size,
        widths.ffn or narrow.ffn_size,
        widths.heads or narrow.heads,
    )
    for name, old, new in (
        ("hidden", narrow.hidden_size, hidden),
        ("ffn", narrow.ffn_size, ffn),
        ("heads", narrow.heads, heads),
    ):
        if new < old:
            raise SpecError(f"--{name} {new}: the model has {old} already")
    if hidden % narrow.hidden_size:
        raise SpecError(
            f"--hidden {hidden}: must be a multiple of {narrow.hidden_size}: norms would see some units more often"
        )
    per_group = narrow.heads // narrow.key_value_heads
    if heads % per_group or (narrow.qk_norm == "projection" and heads % narrow.heads):
        step = narrow.heads if narrow.qk_norm == "projection" else per_group
        raise SpecError(f"--heads {heads}: must be a multiple of {step}, which share keys or a norm")
    size, groups = narrow.size_per_head, heads // per_group
    group = np.arange(groups) % narrow.key_value_heads
    query = (group[:, None] * per_group + np.arange(per_group)).reshape(-1)
    copies: dict[Units, Index] = {
        "hidden": np.arange(hidden) % narrow.hidden_size,
        "ffn": np.arange(ffn) % narrow.ffn_size,
        "queries": (query[:, None] * size + np.arange(size)).reshape(-1),
        "keys": (group[:, None] * size + np.arange(size)).reshape(-1),
    }
    update = {"hidden_size": hidden, "ffn_size": ffn, "heads": heads, "kv_heads": groups, "head_dim": size}
    return ModelSpec.model_validate(narrow.model_dump() | update), copies


def _roles(inside: str, spec: ModelSpec) -> tuple[tuple[Units, bool] | None, ...]:
    if inside in _ROLES:
        return _ROLES[inside]
    module, _, kind = inside.rpartition(".")
    if module in ("attention.query_norm", "attention.key_norm"):
        units: Units = "queries" if module == "attention.query_norm" else "keys"
        return ((units, False),) if spec.qk_norm == "projection" else (None,)
    if module in _ROLES:
        return _ROLES[module] if kind == "weight" else _ROLES[module][:1]
    return (("hidden", False),)


def _final_scale(name: str, narrow: ModelSpec, copies: dict[Units, Index]) -> np.float32:
    """Return the scale of the final norm: a tied head reads copies without division, so its input is divided."""
    tied = narrow.tied_embeddings and name.startswith("final_norm.")
    return np.float32(len(copies["hidden"]) // narrow.hidden_size if tied else 1)


def _grow(
    values: Array, above: Array | None, roles: tuple[tuple[Units, bool] | None, ...], copies: dict[Units, Index]
) -> Array:
    for dim, role in reversed(list(enumerate(roles))):
        if role is None:
            continue
        units, reads = role
        of = copies[units]
        old = values.shape[dim]
        wider = np.take(values, of, axis=dim)
        if reads:
            shape = [1] * values.ndim
            shape[dim] = len(of)
            divisor = np.bincount(of)[of].reshape(shape).astype(np.float32)
            wider = wider / divisor
            above = None if above is None else np.take(above, of, axis=dim) / divisor
        elif above is not None:
            # Rows: new units come from the layer above.
            source = np.take(above, of, axis=dim)
            new = [slice(None)] * values.ndim
            new[dim] = slice(old, None)
            wider[tuple(new)] = source[tuple(new)]
        values = wider
    return values


def _merge(values: npt.NDArray[np.float64], dim: int, of: Index, reads: bool) -> npt.NDArray[np.float64]:
    size = int(of.max()) + 1
    moved = np.moveaxis(values, dim, 0)
    merged = np.zeros((size, *moved.shape[1:]))
    np.add.at(merged, of, moved)
    if not reads:
        merged /= np.bincount(of).reshape(-1, *[1] * (moved.ndim - 1))
    return np.moveaxis(merged, 0, dim)
