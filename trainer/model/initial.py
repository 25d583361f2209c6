"""Initial weights as a pure function of (seed, name, global index), so that every layout starts from the same bits.

A matrix is tiled by its global shape only. Each tile is one stream of normal numbers: NumPy's counter-based Philox
(Salmon et al., 2011) with the key (seed, xxh3 of the name) and one counter block per tile. A box draws only the tiles
that it overlaps.
"""

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

TILE = 4096
"""Maximum number of values in a tile. Changing it changes the initial bits."""


def normal(
    seed: int, name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """Return standard normal values, fp32 on the CPU, for the box of `shape` at `offsets` in `global_shape`."""
    out = np.empty(shape, np.float32)
    width = min(global_shape[1], TILE)
    height = max(1, TILE // width)
    tiles = _Tiles(seed, name, height, width)
    for row in range(offsets[0] // height, -(-(offsets[0] + shape[0]) // height)):
        for column in range(offsets[1] // width, -(-(offsets[1] + shape[1]) // width)):
            _paste(out, offsets, tiles.draw(row, column), (row * height, column * width))
    return torch.from_numpy(out)


class _Tiles:
    """Random streams of one tensor; repositioning a generator is cheaper than creating one per tile."""

    def __init__(self, seed: int, name: str, height: int, width: int) -> None:
        key = np.array([seed, xxhash.xxh3_64_intdigest(name.encode())], np.uint64)
        self._bits = np.random.Philox(key=key)
        self._numbers = np.random.Generator(self._bits)
        self._start = self._bits.state
        self._tile = np.empty((height, width), np.float32)

    def draw(self, row: int, column: int) -> NDArray[np.float32]:
        """Return one tile; the next call overwrites the array."""
        self._start["state"]["counter"][1:3] = column, row
        self._bits.state = self._start
        self._numbers.standard_normal(dtype=np.float32, out=self._tile)
        return self._tile


def _paste(
    out: NDArray[np.float32], offsets: tuple[int, ...], tile: NDArray[np.float32], corner: tuple[int, int]
) -> None:
    """Copy the overlap of `tile`, placed at `corner` of the whole tensor, into the box `out` at `offsets`."""
    target, source = [], []
    for dim in range(2):
        start = max(offsets[dim], corner[dim])
        stop = min(offsets[dim] + out.shape[dim], corner[dim] + tile.shape[dim])
        target.append(slice(start - offsets[dim], stop - offsets[dim]))
        source.append(slice(start - corner[dim], stop - corner[dim]))
    out[tuple(target)] = tile[tuple(source)]
