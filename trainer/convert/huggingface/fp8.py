"""Weights published as FP8 with a factor for each block (DeepSeek-V3, Qwen 3), read as bfloat16. Without torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.format.contents import ITEM_SIZE
from keepwarm.trainer.convert.dtypes import NAMES, as_float32, cast
from keepwarm.trainer.convert.safetensors_file import ReadBytes, Stored
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.model.quantisation import block_of

_SCALES = "_scale_inv"
"""What the name of the factors adds to that of their weight."""
_DTYPE = "BF16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled(Stored):
    """An FP8 matrix, described as the bfloat16 matrix that it stands for: a product of values and factors."""

    values: Stored
    factors: Stored
    block: tuple[int, int]


def dequantised(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors of a folder with each FP8 weight and its factors as one tensor.

    Raises:
        CheckpointError: factors are missing, or do not fit their weight; names the tensor.
    """
    rows, columns = block_of(config)
    found = {name: stored for name, stored in tensors.items() if not name.endswith(_SCALES)}
    for name, stored in found.items():
        if not stored.dtype.startswith("F8_"):
            continue
        factors = tensors.get(name + _SCALES)
        if stored.dtype != "F8_E4M3" or len(stored.shape) != 2 or factors is None or factors.dtype not in NAMES:
            raise CheckpointError(f"{stored.file}: {name} is no F8_E4M3 matrix with factors {name}{_SCALES}")
        grid = (-(-stored.shape[0] // rows), -(-stored.shape[1] // columns))
        if factors.shape != grid:
            raise CheckpointError(f"{factors.file}: {name}{_SCALES} is {list(factors.shape)}, not {list(grid)}")
        found[name] = Scaled(
            file=stored.file,
            dtype=_DTYPE,
            shape=stored.shape,
            start=stored.start,
            size=math.prod(stored.shape) * ITEM_SIZE[_DTYPE],
            values=stored,
            factors=factors,
            block=(rows, columns),
        )
    return found


def read_scaled(matrix: Scaled, start: int, out: Bytes, read: ReadBytes) -> None:
    """Fill `out` with the bytes of the bfloat16 matrix from `start` on; computed in fp32 and rounded once."""
    columns, size = matrix.shape[1], ITEM_SIZE[_DTYPE]
    first = start // (columns * size)
    last = -(-(start + len(out)) // (columns * size))
    stored = np.empty((last - first) * columns, np.uint8)
    read(matrix.values, first * columns, stored)
    values = _E4M3[stored].reshape(last - first, columns)
    values *= np.repeat(_factors(matrix, first, last, read), matrix.block[1], axis=1)[:, :columns]
    made = cast(values.reshape(-1).view(np.uint8), "F32", _DTYPE, matrix.file.name)
    skipped = start - first * columns * size
    out[:] = made[skipped : skipped + len(out)]


def _factors(matrix: Scaled, first: int, last: int, read: ReadBytes) -> Any:
    """Return the factors of each of the rows, one for each block of columns."""
    per_row, top = matrix.factors.shape[1], first // matrix.block[0]
    bottom = -(-last // matrix.block[0])
    width = per_row * ITEM_SIZE[matrix.factors.dtype]
    stored = np.empty((bottom - top) * width, np.uint8)
    read(matrix.factors, top * width, stored)
    grid = as_float32(stored, matrix.factors.dtype).reshape(-1, per_row)
    return grid[np.arange(first, last) // matrix.block[0] - top]


def _table() -> Any:
    """Return the value of every byte: a sign, 4 bits of exponent, 3 of mantissa, and no infinity."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size = np.where(code & 127 == 127, np.nan, size)
    return np.where(code & 128, -size, size).astype(np.float32)


_E4M3 = _table()
