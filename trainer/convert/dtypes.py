"""Floating-point types of weights and casts between them, on raw bytes: NumPy has no bfloat16."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from keepwarm.ft.arrays import Bytes
from keepwarm.trainer.errors import CheckpointError

NAMES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Type names of the safetensors format to those of config.json."""

SHORT: Mapping[str, str] = {
    **{name: name for name in NAMES},
    **{"fp32": "F32", "bf16": "BF16", "fp16": "F16"},
    **{"float32": "F32", "bfloat16": "BF16", "float16": "F16"},
}
"""Type names accepted from users."""


def cast(block: Bytes, source: str, target: str, name: str) -> Bytes:
    """Return the values of `block` in another type, rounded to nearest, ties to even, as in IEEE 754 and torch.

    Raises:
        CheckpointError: a finite value becomes infinite; names the tensor.
    """
    if source == target:
        return block
    wide = as_float32(block, source)
    if target == "F32":
        return wide.view(np.uint8)
    if target == "BF16":
        narrow: npt.NDArray[Any] = _to_bfloat16(wide)
        overflow = ((narrow & 0x7FFF) == 0x7F80) & np.isfinite(wide)
    else:
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        overflow = np.isinf(narrow) & np.isfinite(wide)
    if overflow.any():
        worst = np.abs(wide[overflow]).max()
        raise CheckpointError(f"{name}: {worst:.4g} does not fit into {NAMES[target]}; choose another dtype")
    return narrow.view(np.uint8)


def as_float32(block: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Return the exact values of `block`; a view if they already have that type."""
    match dtype:
        case "F32":
            return block.view(np.float32)
        case "F16":
            return block.view(np.float16).astype(np.float32)
        case "BF16":
            wide = block.view(np.uint16).astype(np.uint32)
            np.left_shift(wide, 16, out=wide)
            return wide.view(np.float32)
    raise CheckpointError(f"dtype {dtype} is not one of {', '.join(NAMES)}")


def _to_bfloat16(wide: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = wide.view(np.uint32)
    # Half of the last kept bit's value, minus one if that bit is even: the carry rounds ties to even.
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    narrow = rounded.astype(np.uint16)
    unordered = np.isnan(wide)
    if unordered.any():
        # The carry could turn a NaN into an infinity; a quiet NaN keeps its sign and payload.
        narrow[unordered] = ((bits[unordered] >> 16) | 0x40).astype(np.uint16)
    return narrow
