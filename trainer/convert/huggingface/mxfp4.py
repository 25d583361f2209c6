"""Weights published as MXFP4 (gpt-oss): 32 numbers of 4 bits share a power of two. Read as bfloat16. Without torch.

A weight NAME of rows of `columns` is stored as NAME_blocks `[rows, columns / 32, 16]`, two numbers in a byte, the first
in its lower half, and NAME_scales `[rows, columns / 32]` (Open Compute Project, Microscaling Formats, version 1.0).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.format.contents import ITEM_SIZE
from keepwarm.trainer.convert.dtypes import cast
from keepwarm.trainer.convert.safetensors_file import ReadBytes, Stored
from keepwarm.trainer.errors import CheckpointError

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16
"""Of the numbers that share a power of two."""
_DTYPE = "BF16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed(Stored):
    """An MXFP4 matrix, described as the bfloat16 matrix that it stands for."""

    blocks: Stored
    scales: Stored


def dequantised(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors of a folder with the blocks and scales of each weight as one tensor.

    Raises:
        CheckpointError: one is missing or does not fit the other; names the tensor.
    """
    packed = {name.removesuffix(_BLOCKS) for name in tensors if name.endswith(_BLOCKS)}
    packed |= {name.removesuffix(_SCALES) for name in tensors if name.endswith(_SCALES)}
    parts = {f"{name}{ending}" for name in packed for ending in (_BLOCKS, _SCALES)}
    found = {name: stored for name, stored in tensors.items() if name not in parts}
    for name in sorted(packed):
        blocks, scales = tensors.get(name + _BLOCKS), tensors.get(name + _SCALES)
        if blocks is None or scales is None:
            one, other = (_BLOCKS, _SCALES) if scales is None else (_SCALES, _BLOCKS)
            raise CheckpointError(f"{tensors[name + one].file}: {name}{one} has no {name}{other} beside it")
        if name in tensors:
            raise CheckpointError(f"{tensors[name].file}: {name} stands beside {name}{_BLOCKS}, which it is made of")
        found[name] = _packed(name, blocks, scales)
    return found


def _packed(name: str, blocks: Stored, scales: Stored) -> Packed:
    if {blocks.dtype, scales.dtype} != {"U8"} or len(scales.shape) != 2 or blocks.shape != (*scales.shape, _BYTES):
        raise CheckpointError(
            f"{blocks.file}: {name}{_BLOCKS} is {blocks.dtype} {list(blocks.shape)}, {name}{_SCALES} {scales.dtype} "
            f"{list(scales.shape)}; a matrix in MXFP4 is U8 [rows, columns / 32, {_BYTES}] and U8 [rows, columns / 32]"
        )
    shape = (scales.shape[0], scales.shape[1] * 2 * _BYTES)
    return Packed(
        file=blocks.file,
        dtype=_DTYPE,
        shape=shape,
        start=blocks.start,
        size=shape[0] * shape[1] * ITEM_SIZE[_DTYPE],
        blocks=blocks,
        scales=scales,
    )


def read_packed(matrix: Packed, start: int, out: Bytes, read: ReadBytes) -> None:
    """Fill `out` with the bytes of the bfloat16 matrix from `start` on; every number is exact."""
    width = 2 * _BYTES * ITEM_SIZE[_DTYPE]
    first, last = start // width, -(-(start + len(out)) // width)
    codes, powers = np.empty((last - first) * _BYTES, np.uint8), np.empty(last - first, np.uint8)
    read(matrix.blocks, first * _BYTES, codes)
    read(matrix.scales, first, powers)
    values = _PAIRS[codes].reshape(last - first, 2 * _BYTES)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= _POWERS[powers][:, None]
    made = cast(values.reshape(-1).view(np.uint8), "F32", _DTYPE, matrix.file.name)
    skipped = start - first * width
    out[:] = made[skipped : skipped + len(out)]


def _pairs() -> Any:
    """Return the two numbers of every byte: a sign, 2 bits of exponent, 1 of mantissa."""
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = np.array([*sizes, *(-size for size in sizes)], np.float32)
    code = np.arange(256)
    return np.stack([values[code & 15], values[code >> 4]], axis=1)


def _powers() -> Any:
    """Return the factor of every scale: 2 to the power of the byte less 127; the last one is not a number."""
    powers = np.ldexp(np.float32(1), np.arange(256) - 127, where=np.arange(256) < 255, out=np.empty(256, np.float32))
    powers[255] = np.nan
    return powers


_PAIRS = _pairs()
_POWERS = _powers()
