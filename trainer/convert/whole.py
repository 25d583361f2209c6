"""Random access to tensors that can only be made whole: the last few are kept."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from keepwarm.ft.format.contents import Bytes

KEPT = 6
"""Units kept: queries, keys and values of one layer with their biases come out of three tensors or out of one."""


class Units(Protocol):
    """Tensors in units that are made whole: a tensor itself, or what lies at one index of its first dim."""

    def dtype(self, name: str) -> str:
        """As the safetensors format names it."""

    def unit_bytes(self, name: str) -> int:
        """Of each unit of a tensor; the last one ends with it."""

    def unit(self, name: str, index: int) -> Bytes:
        """The bytes of one unit, checked."""


class Folder(Units, Protocol):
    """An open foreign checkpoint with its optimizer state."""

    path: Path
    objects: list[str]
    """What is not a tensor, and is left behind."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""

    def number(self, name: str) -> float:
        """The value of a tensor with one element."""


class Whole:
    """A `keepwarm.trainer.convert.streaming.Source` over units, for recipes whose runs jump."""

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
