"""Contents of a snapshot or checkpoint by global name and offset, and the moves that fill one layout from another.

A rank's part of a tensor is a `Piece`: the box of `shape` at `offsets` inside `global_shape`, or only the elements
`flat = (start, stop)` of that box in row-major order. Any piece decomposes into a few boxes whose elements are
contiguous in its own memory, so filling one piece from others is an intersection of boxes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import IncompleteError

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
"""Bytes per element of each dtype, by its safetensors name."""


class Piece(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's part of one global tensor, without its bytes."""

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    flat: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZE:
            raise ValueError(f"{self.name}: unknown dtype {self.dtype!r}; known: {', '.join(ITEM_SIZE)}")
        if not len(self.global_shape) == len(self.offsets) == len(self.shape):
            raise ValueError(f"{self.name}: global shape, offsets and shape differ in length")
        for size, start, whole in zip(self.shape, self.offsets, self.global_shape, strict=True):
            if not 0 <= start <= start + size <= whole:
                raise ValueError(f"{self.name}: {self.shape} at {self.offsets} is outside {self.global_shape}")
        if self.flat is not None and not 0 <= self.flat[0] <= self.flat[1] <= math.prod(self.shape):
            raise ValueError(f"{self.name}: elements {self.flat} are outside a box of {self.shape}")

    @property
    def elements(self) -> int:
        return math.prod(self.shape) if self.flat is None else self.flat[1] - self.flat[0]

    @property
    def bytes(self) -> int:
        return self.elements * ITEM_SIZE[self.dtype]


class Contents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Header of every worker's part of a buffer: its writer, and which bytes hold which piece.

    Encoded with the data, so that a part of a snapshot can be read without any other source.
    """

    version: int = 1
    rank: int
    world: int
    workers: int
    """Workers of the node, and so the number of consecutive parts in a buffer."""
    size: int
    """Bytes of the whole part, including the header. A multiple of the bucket size."""
    entries: tuple[tuple[Piece, int], ...]
    """Pieces and their start offsets within the part, in bytes."""
    meta: Annotated[bytes, msgspec.Meta(max_length=256 << 20)]
    """The writer's own small state."""


_MAGIC = b"keepwarm"
HEAD_BYTES = 16
"""Magic and u64 length before the encoded contents."""
META_BYTES = 1 << 20
"""Default number of bytes reserved for the small state in the contents."""


def encode_contents(contents: Contents) -> bytes:
    body = msgspec.msgpack.encode(contents)
    return _MAGIC + len(body).to_bytes(8, "little") + body


def contents_length(head: Any) -> int:
    """Return the bytes of the encoded contents with their head. `head` is the first `HEAD_BYTES` of a part."""
    raw = bytes(head[:HEAD_BYTES])
    if raw[:8] != _MAGIC:
        raise IncompleteError("there is no part of a snapshot here")
    return HEAD_BYTES + int.from_bytes(raw[8:], "little")


def decode_contents(part: Any) -> Contents:
    """Decode a part's contents from its first `contents_length` bytes. Raise `IncompleteError` if they are invalid."""
    length = contents_length(part)
    if length > len(part):
        raise IncompleteError(f"the head of a part has {length} bytes, {len(part)} are there")
    try:
        contents = msgspec.msgpack.decode(bytes(part[HEAD_BYTES:length]), type=Contents)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IncompleteError(f"the head of a part cannot be read: {error}") from error
    if contents.version != 1:
        raise IncompleteError(f"the head of a part has format {contents.version}, this program reads 1")
    for piece, start in contents.entries:
        if not 0 <= start <= start + piece.bytes <= contents.size:
            raise IncompleteError(f"{piece.name} lies outside the part that is said to hold it")
    return contents


class Box(msgspec.Struct, frozen=True):
    """A box of a global tensor, held in row-major order by elements `start ...` of its piece."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Copy the region `shape` at `offsets` of a global tensor from box `read` of a source into box `write`."""

    source: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    read: Box
    write: Box
    item_size: int

    @property
    def span(self) -> tuple[int, int]:
        """The bytes (start, stop) of the source piece that this move reads."""
        first = [o - b for o, b in zip(self.offsets, self.read.offsets, strict=True)]
        last = [f + s - 1 for f, s in zip(first, self.shape, strict=True)]
        start = self.read.start + _ravel(first, self.read.shape)
        return start * self.item_size, (self.read.start + _ravel(last, self.read.shape) + 1) * self.item_size

    @property
    def run(self) -> tuple[int, int] | None:
        """The bytes (start, stop) of the target piece written by this move, if it is a plain copy of `span`."""
        if not (_contiguous(self.shape, self.read.shape) and _contiguous(self.shape, self.write.shape)):
            return None
        first = [o - b for o, b in zip(self.offsets, self.write.offsets, strict=True)]
        start = (self.write.start + _ravel(first, self.write.shape)) * self.item_size
        return start, start + math.prod(self.shape) * self.item_size


def boxes(piece: Piece) -> list[Box]:
    """Return the piece as boxes, in the order of its own memory; at most 2 x dimensions - 1 of them."""
    start, stop = piece.flat or (0, math.prod(piece.shape))
    found: list[Box] = []
    for offsets, shape in _runs(piece.shape, start, stop):
        where = tuple(o + p for o, p in zip(offsets, piece.offsets, strict=True))
        found.append(Box(where, shape, sum(box.elements for box in found)))
    return found


def plan(target: Piece, sources: Sequence[Piece]) -> list[Move]:
    """Return moves that fill `target` from `sources`, each element once. Earlier sources are preferred.

    Sources with another name are skipped. Raise `IncompleteError` if no source has an element, or if a source of the
    same name has another global shape or dtype.
    """
    moves: list[Move] = []
    holes = boxes(target)
    for index, source in enumerate(sources):
        if source.name != target.name or not holes:
            continue
        if (source.global_shape, source.dtype) != (target.global_shape, target.dtype):
            raise IncompleteError(
                f"{target.name}: wanted {target.dtype}{list(target.global_shape)}, "
                f"stored is {source.dtype}{list(source.global_shape)}: this is the state of another model"
            )
        for read in boxes(source):
            left: list[Box] = []
            for hole in holes:
                shared = _intersection(hole, read)
                if shared is None:
                    left.append(hole)
                    continue
                moves.append(
                    Move(
                        source=index,
                        offsets=shared[0],
                        shape=shared[1],
                        read=read,
                        write=hole,
                        item_size=ITEM_SIZE[target.dtype],
                    )
                )
                left.extend(_minus(hole, *shared))
            holes = left
    if holes:
        raise IncompleteError(
            f"{target.name}: no stored piece holds {list(holes[0].shape)} at {list(holes[0].offsets)} "
            f"of {list(target.global_shape)}"
        )
    by_start = boxes(target)
    return [msgspec.structs.replace(move, write=_holder(by_start, move)) for move in moves]


def split(move: Move, limit: int) -> Iterator[Move]:
    """Yield moves that together copy the same. Each reads at most `limit` bytes of the source, or one element."""
    start, stop = move.span
    dim = next((dim for dim, size in enumerate(move.shape) if size > 1), None)
    if stop - start <= limit or dim is None:
        yield move
        return
    half = move.shape[dim] // 2
    for first, size in ((0, half), (half, move.shape[dim] - half)):
        offsets, shape = list(move.offsets), list(move.shape)
        offsets[dim], shape[dim] = offsets[dim] + first, size
        yield from split(msgspec.structs.replace(move, offsets=tuple(offsets), shape=tuple(shape)), limit)


def move_bytes(move: Move, source: Bytes, target: Bytes) -> None:
    """Execute a move. `source` is the bytes `move.span` of the source piece, `target` the whole target piece."""
    run = move.run
    if run is not None:
        np.copyto(target[run[0] : run[1]], source[: run[1] - run[0]])
        return
    shift = move.span[0] // move.item_size
    first = [o - b for o, b in zip(move.offsets, move.read.offsets, strict=True)]
    # A strided view of the span only: the source may be a fragment of the piece, too short for the whole box.
    strides = _strides(move.read.shape, move.item_size)
    skip = (move.read.start + _ravel(first, move.read.shape) - shift) * move.item_size
    seen = np.lib.stride_tricks.as_strided(source[skip:], (*move.shape, move.item_size), (*strides, 1), writeable=False)
    begin = move.write.start * move.item_size
    box = target[begin : begin + move.write.elements * move.item_size].reshape(*move.write.shape, move.item_size)
    where = tuple(slice(o - b, o - b + s) for o, b, s in zip(move.offsets, move.write.offsets, move.shape, strict=True))
    np.copyto(box[where], seen)


def as_bytes(memory: Any) -> Bytes:
    """Return a flat byte view of any contiguous buffer, without copying."""
    view = memoryview(memory)
    return np.frombuffer(view if view.nbytes else b"", dtype=np.uint8)


def _runs(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield boxes (offsets, shape) that hold the elements start ... stop of an array of `shape`, in order."""
    if start >= stop:
        return
    if stop - start == math.prod(shape):
        yield (0,) * len(shape), shape
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        for offsets, size in _runs(shape[1:], start - first * row, stop - first * row):
            yield (first, *offsets), (1, *size)
        return
    whole = first
    if start % row:
        yield from _runs(shape, start, (first + 1) * row)
        whole = first + 1
    end = stop // row
    if whole < end:
        yield (whole, *(0,) * (len(shape) - 1)), (end - whole, *shape[1:])
    yield from _runs(shape, end * row, stop)


def _intersection(one: Box, two: Box) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    offsets, shape = [], []
    for a, n, b, m in zip(one.offsets, one.shape, two.offsets, two.shape, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        offsets.append(low)
        shape.append(high - low)
    return tuple(offsets), tuple(shape)


def _minus(box: Box, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Box]:
    """Yield the rest of `box` without the region, as boxes whose `start` is meaningless."""
    low, size = list(box.offsets), list(box.shape)
    for dim, (o, s) in enumerate(zip(offsets, shape, strict=True)):
        for a, b in ((low[dim], o), (o + s, low[dim] + size[dim])):
            if a < b:
                yield Box((*low[:dim], a, *low[dim + 1 :]), (*size[:dim], b - a, *size[dim + 1 :]), 0)
        low[dim], size[dim] = o, s


def _holder(parts: list[Box], move: Move) -> Box:
    whole = Box(move.offsets, move.shape, 0)
    return next(box for box in parts if _intersection(box, whole) is not None)


def _ravel(index: Sequence[int], shape: Sequence[int]) -> int:
    flat = 0
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


def _strides(shape: Sequence[int], item_size: int) -> tuple[int, ...]:
    return tuple(item_size * math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _contiguous(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Return whether a region of shape `part` is contiguous inside a row-major box of shape `whole`."""
    dims = list(zip(part, whole, strict=True))
    while dims and dims[0][0] == 1:
        dims.pop(0)
    return all(n == w for n, w in dims[1:])
