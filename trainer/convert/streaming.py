"""Tensors made from recipes, in blocks of bounded size: memory does not grow with the model."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from ft.contents import ITEM_SIZE, Bytes
from trainer.convert.dtypes import cast
from trainer.convert.recipes import Recipe

BLOCK = 16 << 20
"""Bytes read at once."""


class Source(Protocol):
    """Where tensors are read from."""

    def dtype(self, name: str) -> str:
        """As the safetensors format names it."""

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out` with the bytes from `start` of a tensor."""


class Maker:
    """Makes tensors of `dtype` (default: that of their source) from `source`, one block at a time."""

    def __init__(self, source: Source, dtype: str | None) -> None:
        self._source = source
        self._dtype = dtype
        # Touched once: fresh memory for every block would cost more than the reading.
        self._block = np.empty(BLOCK, np.uint8)

    def dtype(self, recipe: Recipe) -> str:
        return self._dtype or self._source.dtype(recipe.runs[0][0])

    def keeps(self, recipe: Recipe) -> bool:
        """Whether the tensor has the dtype of its source."""
        return self._dtype in (None, self._source.dtype(recipe.runs[0][0]))

    def bytes(self, recipe: Recipe) -> int:
        return recipe.elements * ITEM_SIZE[self.dtype(recipe)]

    def blocks(self, recipe: Recipe, seen: Callable[[Any], object] | None = None) -> Iterator[Bytes]:
        """The bytes of the tensor; a block is overwritten by the next. `seen` is called with them before any cast."""
        stored = self._source.dtype(recipe.runs[0][0])
        for block in self._turned(recipe, stored) if recipe.turned else self._gathered(recipe, stored):
            if seen is not None:
                seen(block)
            yield cast(block, stored, self.dtype(recipe), recipe.name)

    def _gathered(self, recipe: Recipe, stored: str) -> Iterator[Bytes]:
        size, filled = ITEM_SIZE[stored], 0
        for name, first, last in recipe.runs:
            start, stop = first * size, last * size
            while start < stop:
                count = min(stop - start, BLOCK - filled)
                self._source.read(name, start, self._block[filled : filled + count])
                start, filled = start + count, filled + count
                if filled == BLOCK:
                    yield self._block
                    filled = 0
        if filled:
            yield self._block[:filled]

    def _turned(self, recipe: Recipe, stored: str) -> Iterator[Bytes]:
        size, at = ITEM_SIZE[stored], 0
        whole = np.empty(recipe.elements * size, np.uint8)
        for block in self._gathered(recipe, stored):
            whole[at : at + len(block)] = block
            at += len(block)
        rows, columns = recipe.shape
        matrix = whole.view(f"u{size}").reshape(columns, rows).T
        step = max(1, BLOCK // (columns * size))
        for row in range(0, rows, step):
            yield np.ascontiguousarray(matrix[row : row + step]).reshape(-1).view(np.uint8)
