"""Random access to tensors that can only be loaded whole; keeps the last few."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from keepwarm.ft.arrays import Bytes

KEPT = 6
"""Units to keep: one layer's queries, keys and values with biases come from three tensors or from one."""


class Units(Protocol):
    """Tensors in units that are loaded whole: a tensor itself, or the slice at one index of its first dimension."""

    def dtype(self, name: str) -> str:
        """Return the dtype, as named by the safetensors format; one that it lacks, as by torch, in capitals."""

    def unit_bytes(self, name: str) -> int:
        """Return the bytes of each unit of a tensor, which ends with the last one."""

    def unit(self, name: str, index: int) -> Bytes:
        """Return the verified bytes of one unit."""


class Folder(Units, Protocol):
    """An open foreign checkpoint with its optimizer state."""

    path: Path
    objects: list[str]
    """Non-tensor contents, which are not converted."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The tensors by name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""

    def number(self, name: str) -> float:
        """Return the value of a single-element tensor."""


class Whole:
    """A `keepwarm.trainer.convert.streaming.Source` over units, for recipes whose runs are not sequential."""

    def __init__(self, units: Units) -> None:
        self._units = units
        self._held: OrderedDict[tuple[str, int], Bytes] = OrderedDict()

    def dtype(self, name: str) -> str:
        return self._units.dtype(name)

    def read(self, name: str, start: int, out: Bytes) -> None:
        size, at = self._units.unit_bytes(name), 0
        while at < len(out):
            index, inside = divmod(start + at, size)
            count = min(len(out) - at, size - inside)
            out[at : at + count] = self._unit(name, index)[inside : inside + count]
            at += count

    def _unit(self, name: str, index: int) -> Bytes:
        key = name, index
        if key not in self._held:
            while len(self._held) >= KEPT:
                self._held.popitem(last=False)
            self._held[key] = self._units.unit(name, index)
        self._held.move_to_end(key)
        return self._held[key]
