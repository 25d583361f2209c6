"""Initial weights as a pure function of (seed, name, global index), so that every layout starts from the same bits.

A matrix is tiled by its global shape alone. Each tile is one stream of normal numbers: NumPy's counter-based Philox
(Salmon et al., 2011) with the key (seed, xxh3 of the name) and a counter block per tile. A box draws only the tiles
that it touches.
"""

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

TILE = 4096
"""Numbers in a tile, at most. Part of what fixes the bits."""


def normal(
    seed: int, name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """Standard normal numbers, fp32 on the CPU, of the box of `shape` at `offsets` in a matrix of `global_shape`."""
    out = np.empty(shape, np.float32)
    width = min(global_shape[1], TILE)
    height = max(1, TILE // width)
    tiles = _Tiles(seed, name, height, width)
    for row in range(offsets[0] // height, -(-(offsets[0] + shape[0]) // height)):
        for column in range(offsets[1] // width, -(-(offsets[1] + shape[1]) // width)):
            _paste(out, offsets, tiles.draw(row, column), (row * height, column * width))
    return torch.from_numpy(out)


class _Tiles:
    """The streams of one tensor; positioning an existing generator is cheaper than making one per tile."""

    def __init__(self, seed: int, name: str, height: int, width: int) -> None:
        key = np.array([seed, xxhash.xxh3_64_intdigest(name.encode())], np.uint64)
        self._bits = np.random.Philox(key=key)
        self._numbers = np.random.Generator(self._bits)
        self._start = self._bits.state
        self._tile = np.empty((height, width), np.float32)

    def draw(self, row: int, column: int) -> NDArray[np.float32]:
        """One tile; the array is overwritten by the next call."""
        self._start["state"]["counter"][1:3] = column, row
        self._bits.state = self._start
        self._numbers.standard_normal(dtype=np.float32, out=self._tile)
        return self._tile


def _paste(
    out: NDArray[np.float32], offsets: tuple[int, ...], tile: NDArray[np.float32], corner: tuple[int, int]
) -> None:
    """Copy what `tile`, at `corner` of the whole tensor, shares with the box `out` at `offsets`."""
    target, source = [], []
    for dim in range(2):
        start = max(offsets[dim], corner[dim])
        stop = min(offsets[dim] + out.shape[dim], corner[dim] + tile.shape[dim])
        target.append(slice(start - offsets[dim], stop - offsets[dim]))
        source.append(slice(start - corner[dim], stop - corner[dim]))
    out[tuple(target)] = tile[tuple(source)]
