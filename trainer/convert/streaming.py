"""Build tensors from recipes, in blocks of bounded size: memory does not grow with the model."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.format.contents import ITEM_SIZE
from keepwarm.trainer.convert.dtypes import cast
from keepwarm.trainer.convert.recipes import Recipe

BLOCK = 8 << 20
"""Bytes per read."""
_AHEAD = 2
"""Number of blocks prepared while one is in use."""


class Source(Protocol):
    """A source of tensors."""

    def dtype(self, name: str) -> str:
        """Return the dtype, as named by the safetensors format."""

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out` with the bytes of a tensor from `start` on."""


class Maker:
    """Builds tensors of `dtype` (default: their source's) from `source`, one block at a time."""

    def __init__(self, source: Source, dtype: str | None) -> None:
        self._source = source
        self._dtype = dtype
        # Allocated once: new memory for every block would cost more than reading. One is in use while one is filled.
        self._memory = deque(np.empty(BLOCK, np.uint8) for _ in range(_AHEAD + 2))

    def dtype(self, recipe: Recipe) -> str:
        return self._dtype or self._source.dtype(recipe.runs[0][0])

    def keeps(self, recipe: Recipe) -> bool:
        """Return whether the tensor keeps the dtype of its source."""
        return self._dtype in (None, self._source.dtype(recipe.runs[0][0]))

    def bytes(self, recipe: Recipe) -> int:
        return recipe.elements * ITEM_SIZE[self.dtype(recipe)]

    def blocks(self, recipe: Recipe, seen: Callable[[Any], object] | None = None) -> Iterator[Bytes]:
        """Yield the bytes of the tensor; a block is valid until the next is requested. `seen` gets them before any
        cast.
        """
        stored = self._source.dtype(recipe.runs[0][0])
        for block in self._turned(recipe, stored) if recipe.turned else self._gathered(recipe, stored):
            if seen is not None:
                seen(block)
            yield cast(block, stored, self.dtype(recipe), recipe.name)

    @contextlib.contextmanager
    def ahead(
        self, recipes: Iterable[Recipe], seen: Callable[[Recipe], Callable[[Any], object] | None] = lambda _: None
    ) -> Iterator[Callable[[Recipe], Iterator[Bytes]]]:
        """Yield the `blocks` of all recipes, which a thread reads and casts while earlier ones are written.

        Tensors must be consumed in the order of `recipes`, each to its end. Exceptions of the thread are raised in the
        consumer.
        """
        made: queue.Queue[tuple[str, Bytes | BaseException | None]] = queue.Queue(_AHEAD)
        stopped = threading.Event()

        def put(name: str, what: Bytes | BaseException | None) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    made.put((name, what), timeout=0.1)
                    return

        def make() -> None:
            name = ""
            try:
                for recipe in recipes:
                    name = recipe.name
                    for block in self.blocks(recipe, seen(recipe)):
                        put(name, block)
                        if stopped.is_set():
                            return
                    put(name, None)
            except BaseException as error:
                put(name, error)

        def take(recipe: Recipe) -> Iterator[Bytes]:
            while True:
                name, what = made.get()
                if isinstance(what, BaseException):
                    raise what
                assert name == recipe.name, f"{recipe.name} taken, {name} is next"
                if what is None:
                    return
                yield what

        thread = threading.Thread(target=make, name="read ahead", daemon=True)
        thread.start()
        try:
            yield take
        finally:
            stopped.set()
            thread.join()

    def _gathered(self, recipe: Recipe, stored: str) -> Iterator[Bytes]:
        size, filled, memory = ITEM_SIZE[stored], 0, self._memory[0]
        for name, first, last in recipe.runs:
            start, stop = first * size, last * size
            while start < stop:
                if filled == 0:
                    # A block that was handed out may be in use until all others have been handed out too.
                    self._memory.rotate(1)
                    memory = self._memory[0]
                count = min(stop - start, BLOCK - filled)
                self._source.read(name, start, memory[filled : filled + count])
                start, filled = start + count, filled + count
                if filled == BLOCK:
                    yield memory
                    filled = 0
        if filled:
            yield memory[:filled]

    def _turned(self, recipe: Recipe, stored: str) -> Iterator[Bytes]:
        size, at = ITEM_SIZE[stored], 0
        whole = np.empty(recipe.elements * size, np.uint8)
        for name, first, last in recipe.runs:
            count = (last - first) * size
            self._source.read(name, first * size, whole[at : at + count])
            at += count
        rows, columns = recipe.shape
        matrix = whole.view(f"u{size}").reshape(columns, rows).T
        step = max(1, BLOCK // (columns * size))
        for row in range(0, rows, step):
            yield np.ascontiguousarray(matrix[row : row + step]).reshape(-1).view(np.uint8)
