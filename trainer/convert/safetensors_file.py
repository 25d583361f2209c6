"""Safetensors files: read without trusting their headers, and written in blocks."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.foreign_json import parse_json
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.format.contents import ITEM_SIZE
from keepwarm.ft.format.writer import begin_writeback
from keepwarm.trainer.errors import CheckpointError

_BITS = {name: 8 * size for name, size in ITEM_SIZE.items()} | {
    "C64": 64, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element of every dtype of the format, those that no weight here may have among them."""

HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors library also refuses longer headers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Location of one tensor: `size` bytes from byte `start` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


ReadBytes = Callable[[Stored, int, Bytes], object]
"""Fill the last argument with the bytes of a stored tensor from the second on."""


def read_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors in a file, after checking every number in its header against the file.

    Raises:
        CheckpointError: names the file, and the tensor if the error concerns one.
    """
    try:
        with path.open("rb") as file:
            available = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, available - 8):
                raise CheckpointError(f"{path}: claims a header of {length} bytes, the file has {available}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    table = strict_json(text, path)
    table.pop("__metadata__", None)
    tensors = {name: _stored(path, name, note, 8 + length) for name, note in table.items()}
    end = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda pair: (pair[1].start, pair[1].size)):
        if stored.start != end:
            raise CheckpointError(f"{path}: {name} begins at byte {stored.start}, the one before it ends at {end}")
        end += stored.size
    if end != available:
        raise CheckpointError(f"{path}: its header describes {end} bytes, the file has {available}; is it truncated?")
    return tensors


def strict_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys. Raises `CheckpointError` naming the file."""
    try:
        table = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: a {type(table).__name__} where an object should be")
    return table


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[Bytes]],
) -> None:
    """Write and sync a file of tensors (dtype and shape by name), whose bytes come in blocks of any size."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + math.prod(shape) * ITEM_SIZE[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        under_way = file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            for block in blocks(name):
                file.write(block.data)
                under_way = begin_writeback(file, under_way)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_size != 8 + len(text) + start:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes written instead of {8 + len(text) + start}")


def _stored(path: Path, name: str, note: Any, data: int) -> Stored:
    try:
        dtype, shape, (start, stop) = note["dtype"], tuple(note["shape"]), note["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError("a size or offset is not a whole number")
        size, rest = divmod(math.prod(shape) * _BITS[dtype], 8)
        if rest:
            raise ValueError("it does not end with a byte")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {name} is described as {str(note)[:200]}: {error!r}") from error
    if stop - start != size:
        raise CheckpointError(f"{path}: {name} has {stop - start} bytes, {dtype}{list(shape)} has {size}")
    return Stored(file=path, dtype=dtype, shape=shape, start=data + start, size=size)


def read_exactly(descriptor: int, path: Path, start: int, out: Bytes) -> None:
    """Fill `out` from byte `start` of an open file. Raises `CheckpointError` naming it when it ends early."""
    view = memoryview(out.data)
    try:
        while view:
            count = os.preadv(descriptor, [view], start)
            if not count:
                raise CheckpointError(f"{path}: ends {len(view)} bytes too early")
            view, start = view[count:], start + count
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
