"""Read parts of a durable checkpoint. Every length in a file is checked against the file before use."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import xxhash
import zstandard

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import DurableError
from keepwarm.ft.format.contents import as_bytes
from keepwarm.ft.format.manifest import MANIFEST, Entry, Part, check_entry
from keepwarm.ft.format.writer import EPOCH, STEP, Note

HEADER_LIMIT = 100_000_000
"""Maximum header bytes, the limit of the safetensors library too."""
BLOCK = 4 << 20
"""Bytes per read."""


def read_part(
    directory: Path, part: Part, memory: Bytes | None = None
) -> Iterator[tuple[Entry, Iterator[bytes | memoryview]]]:
    """Yield the pieces of one part with their bytes in blocks, in file order. The caller verifies the checksums.

    With `memory`, blocks are views of it, each overwritten by the next.
    """
    path = directory / part.file
    with _opened(path) as file:
        header = _exactly(file, part.header_bytes, path)
        if xxhash.xxh3_64_hexdigest(header) != part.header_xxh3:
            raise DurableError(f"{path}: its header is not the one in {MANIFEST}")
        for entry in part.entries:
            yield entry, _blocks(file, entry.stop - entry.start, path, memory)
        if file.read(1):
            raise DurableError(f"{path}: longer than {MANIFEST} says")


def expand(file: IO[bytes], part: Part, entry: Entry, where: str, out: Bytes) -> None:
    """Read one piece of a compressed part, opened at its start, into `out`. The caller verifies the checksum."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as reader:
            _skip(reader, part.header_bytes + entry.start, Path(where))
            _fill(reader, out, Path(where))
    except zstandard.ZstdError as error:
        raise DurableError(f"{where}: {error}") from error


def read_header(path: Path) -> Part:
    """Read the header of a part. Raise `DurableError` naming the file if they contradict each other."""
    with _opened(path) as file:
        length = int.from_bytes(_exactly(file, 8, path), "little")
        bound = HEADER_LIMIT if path.suffix == ".zst" else min(HEADER_LIMIT, path.stat().st_size - 8)
        if not 0 < length <= bound:
            raise DurableError(f"{path}: claims a header of {length} bytes, at most {bound} can be")
        text = _exactly(file, length, path)
    try:
        table = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        notes = msgspec.json.decode(table.pop("__metadata__"), type=dict[str, str])
        pieces = msgspec.json.decode(notes["keepwarm.pieces"], type=dict[str, Note])
        entries = []
        for name, raw in table.items():
            start, stop = msgspec.json.decode(raw, type=_Slice).data_offsets
            note = pieces[name]
            entry = Entry(piece=note.piece, start=start, stop=stop, xxh3=note.xxh3, chunks=note.chunks)
            check_entry(entry, str(path))
            entries.append(entry)
        entries.sort(key=lambda entry: (entry.start, entry.stop))
        rank = int(notes["keepwarm.rank"])
        epoch, step = (int(notes[key]) if key in notes else None for key in (EPOCH, STEP))
    except (msgspec.DecodeError, KeyError, ValueError, RecursionError) as error:
        raise DurableError(f"{path}: not a part of a keepwarm checkpoint: {error}") from error
    stops = [0, *(entry.stop for entry in entries)]
    if [entry.start for entry in entries] != stops[:-1]:
        raise DurableError(f"{path}: its tensors do not lie one after the other")
    return Part(
        file=path.name,
        rank=rank,
        header_xxh3=xxhash.xxh3_64_hexdigest(length.to_bytes(8, "little") + text),
        header_bytes=8 + length,
        data_bytes=stops[-1],
        entries=tuple(entries),
        epoch=epoch,
        step=step,
    )


def compare(directory: Path, part: Part, entry: Entry, seen: str) -> None:
    """Raise `DurableError` unless the computed checksum `seen` equals that of the entry."""
    if seen != entry.xxh3:
        raise DurableError(f"{directory / part.file}: {entry.piece.name} has checksum {seen}, written was {entry.xxh3}")


def _skip(file: Any, count: int, path: Path) -> None:
    for _ in _blocks(file, count, path):
        pass


def _fill(file: Any, out: Bytes, path: Path) -> None:
    at = 0
    for block in _blocks(file, len(out), path):
        out[at : at + len(block)] = as_bytes(block)
        at += len(block)


class _Slice(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            if path.suffix == ".zst":
                with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as reader:
                    yield io.BufferedReader(reader, BLOCK)
            else:
                yield file
    except (OSError, zstandard.ZstdError) as error:
        raise DurableError(f"{path}: {error}") from error


def _exactly(file: Any, size: int, path: Path) -> bytes:
    return b"".join(_blocks(file, size, path))


def _blocks(file: Any, size: int, path: Path, memory: Bytes | None = None) -> Iterator[bytes | memoryview]:
    while size > 0:
        try:
            block: bytes | memoryview
            if memory is None:
                block = file.read(min(size, BLOCK))
            else:
                block = memory.data[: file.readinto(memory.data[: min(size, len(memory))])]
        except zstandard.ZstdError as error:
            raise DurableError(f"{path}: {error}") from error
        if not block:
            raise DurableError(f"{path}: ends {size} bytes too early")
        size -= len(block)
        yield block
