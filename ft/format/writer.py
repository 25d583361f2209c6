"""Write parts of a durable checkpoint: one rank's safetensors file, written in blocks and synced."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec
import xxhash
import zstandard

from keepwarm.files import READABLE
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import DurableError
from keepwarm.ft.format.contents import ITEM_SIZE, Piece, as_bytes
from keepwarm.ft.format.manifest import CHUNK, Entry, Part

_WRITEBACK = 16 << 20
EPOCH, STEP = "keepwarm.epoch", "keepwarm.step"
"""Keys of a part's header that say which state its bytes belong to."""


def age_notes(epoch: int, step: int) -> dict[str, str]:
    """Return what `write_part` takes as `meta` so that the part carries its (epoch, step)."""
    return {EPOCH: str(epoch), STEP: str(step)}


Blocks = Callable[[Piece], Iterable[Any]]
"""Yields the bytes of a piece, in any portions."""


class Note(msgspec.Struct, frozen=True, array_like=True):
    """A piece's entry in a part header."""

    piece: Piece
    xxh3: str
    chunks: tuple[str, ...] = ()


def write_part(
    directory: Path, rank: int, tensors: Iterable[tuple[Piece, Any]], *, meta: Mapping[str, str] | None = None,
    compress: bool = False,
) -> Part:  # fmt: skip
    """Write one rank's pieces, each with the contiguous buffer that holds its bytes, and sync the file.

    The caller must not change the buffers meanwhile. An existing part of the same rank is overwritten.
    """
    pairs = sorted(tensors, key=lambda pair: (-ITEM_SIZE[pair[0].dtype], pair[0].name))
    pieces, views = [piece for piece, _ in pairs], {piece.name: as_bytes(buffer) for piece, buffer in pairs}
    for piece in pieces:
        if len(views[piece.name]) != piece.bytes:
            raise DurableError(f"{piece.name}: {len(views[piece.name])} bytes given, its piece has {piece.bytes}")
    blocks = partial(_blocks_of, views)
    return write_part_blocks(directory, rank, pieces, blocks, meta=meta, compress=compress)


def _blocks_of(views: Mapping[str, Bytes], piece: Piece) -> Iterator[Any]:
    return _blocks(views[piece.name])


def _blocks(view: Bytes) -> Iterator[Any]:
    for at in range(0, len(view), _WRITEBACK):
        yield view.data[at : at + _WRITEBACK]


def _write_compressed(
    directory: Path, rank: int, pieces: Sequence[Piece], blocks: Blocks, meta: dict[str, str]
) -> Part:
    """Write a compressed part. Checksums are computed first, because nothing can be prepended to compressed data."""
    entries, start = [], 0
    for piece in pieces:
        sums = Sums()
        for block in blocks(piece):
            sums.update(block)
        stop = start + piece.bytes
        entries.append(Entry(piece=piece, start=start, stop=stop, xxh3=sums.whole(), chunks=sums.chunks()))
        start = stop
    header = _header(rank, entries, meta)
    name = f"rank_{rank:05d}.safetensors.zst"
    packer = zstandard.ZstdCompressor(level=1, write_checksum=True)
    with _new_part(directory, rank, name) as file, packer.stream_writer(file, closefd=False) as out:
        out.write(header)
        under_way = 0
        for piece in pieces:
            for block in blocks(piece):
                out.write(block)
                under_way = begin_writeback(file, under_way)
    return _part(name, rank, header, entries, meta)


def _check_names(rank: int, pieces: Sequence[Piece]) -> None:
    if len({piece.name for piece in pieces}) != len(pieces):
        raise DurableError(f"rank {rank} has two pieces of one name")


def write_part_blocks(
    directory: Path, rank: int, pieces: Sequence[Piece], blocks: Blocks, *,
    meta: Mapping[str, str] | None = None, compress: bool = False,
) -> Part:  # fmt: skip
    """Write pieces larger than memory, as `write_part`. `blocks(piece)` yields the bytes of each, in any portions.

    Pieces are stored in the given order. The producer may overwrite a block once the next one is requested. With
    `compress` it is called twice for each piece.
    """
    _check_names(rank, pieces)
    if compress:
        return _write_compressed(directory, rank, pieces, blocks, dict(meta or {}))
    # Checksums come first in the file but are known last, so reserve exactly their length.
    unknown = xxhash.xxh3_64_hexdigest(b"")
    entries, start = [], 0
    for piece in pieces:
        chunks = (unknown,) * -(-piece.bytes // CHUNK) if piece.bytes > CHUNK else ()
        entries.append(Entry(piece=piece, start=start, stop=start + piece.bytes, xxh3=unknown, chunks=chunks))
        start += piece.bytes
    name = f"rank_{rank:05d}.safetensors"
    with _new_part(directory, rank, name) as file:
        room = len(_header(rank, entries, dict(meta or {})))
        file.seek(room)
        under_way = room
        for index, entry in enumerate(entries):
            sums, written = Sums(), 0
            for block in blocks(entry.piece):
                sums.update(block)
                file.write(block)
                written += len(block)
                under_way = begin_writeback(file, under_way)
            if written != entry.piece.bytes:
                raise DurableError(f"{entry.piece.name}: {written} bytes given, its piece has {entry.piece.bytes}")
            entries[index] = msgspec.structs.replace(entry, xxh3=sums.whole(), chunks=sums.chunks())
        header = _header(rank, entries, dict(meta or {}))
        file.seek(0)
        file.write(header)
    return _part(name, rank, header, entries, dict(meta or {}))


class Sums:
    """Checksums of a piece, whole and per chunk, from blocks of any size."""

    def __init__(self) -> None:
        self._whole, self._chunk = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._filled = 0
        self._chunks: list[str] = []

    def update(self, block: Any) -> None:
        view = memoryview(block).cast("B") if memoryview(block).nbytes else memoryview(b"")
        self._whole.update(view)
        while len(view):
            part = view[: CHUNK - self._filled]
            self._chunk.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHUNK:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk.reset()
                self._filled = 0

    def whole(self) -> str:
        return str(self._whole.hexdigest())

    def chunks(self) -> tuple[str, ...]:
        """Return the checksums for `Entry.chunks`."""
        found = (*self._chunks, self._chunk.hexdigest()) if self._filled else tuple(self._chunks)
        return found if len(found) > 1 else ()


def begin_writeback(file: IO[bytes], start: int) -> int:
    """Start writing bytes from `start` to disk while more are produced. Return the start of the next call's range.

    Without this the disk would idle until the final sync, which would then take as long as the writing did.
    """
    stop = file.tell()
    if stop - start < _WRITEBACK or not hasattr(os, "posix_fadvise"):
        return start
    file.flush()
    # Linux writes dirty pages out before dropping them, without blocking.
    os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
    return stop


def _header(rank: int, entries: list[Entry], meta: dict[str, str]) -> bytes:
    table: dict[str, Any] = {
        "__metadata__": {
            **meta,
            "keepwarm.rank": str(rank),
            "keepwarm.pieces": msgspec.json.encode(
                {e.piece.name: Note(e.piece, e.xxh3, e.chunks) for e in entries}
            ).decode(),
        }
    }
    for entry in entries:
        piece = entry.piece
        shape = piece.shape if piece.flat is None else (piece.flat[1] - piece.flat[0],)
        table[piece.name] = {"dtype": piece.dtype, "shape": shape, "data_offsets": (entry.start, entry.stop)}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _new_part(directory: Path, rank: int, name: str) -> Iterator[IO[bytes]]:
    """Open a file and yield it. Once complete and synced, it replaces any part of this rank."""
    path = directory / f".{name}"
    for other in (*directory.glob(f"rank_{rank:05d}.safetensors*"), path):
        other.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, READABLE)
    with os.fdopen(descriptor, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    path.rename(directory / name)


def _part(name: str, rank: int, header: bytes, entries: list[Entry], meta: Mapping[str, str]) -> Part:
    epoch, step = (int(meta[key]) if key in meta else None for key in (EPOCH, STEP))
    return Part(
        file=name,
        rank=rank,
        header_xxh3=xxhash.xxh3_64_hexdigest(header),
        header_bytes=len(header),
        data_bytes=entries[-1].stop if entries else 0,
        entries=tuple(entries),
        epoch=epoch,
        step=step,
    )
