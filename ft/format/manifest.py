"""Manifest of a durable checkpoint: `manifest.json`, its parts, and every piece in them."""

import re
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.ft.errors import DurableError
from keepwarm.ft.format.contents import Piece

VERSION = 1
MANIFEST = "manifest.json"
CHUNK = 4 << 20
"""Bytes per separately checksummed chunk of a long piece. Partial reads fetch whole chunks."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One piece in a part: bytes `start ... stop` of the file's data, and their xxh3_64."""

    piece: Piece
    start: int
    stop: int
    xxh3: str
    chunks: tuple[str, ...] = ()
    """The xxh3_64 of every `CHUNK` bytes, the last one shorter. Empty for a piece of one chunk."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's file."""

    file: str
    rank: int
    header_xxh3: str
    header_bytes: int
    data_bytes: int
    entries: tuple[Entry, ...]
    epoch: int | None = None
    step: int | None = None
    """Age of the state, as the header says. None in parts of versions before 0.2, and of converters."""

    @property
    def compressed(self) -> bool:
        return self.file.endswith(".zst")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Identity and contents of a checkpoint. `meta` is its writer's own JSON."""

    version: int
    run: str
    epoch: int
    step: int
    layout: str
    meta: dict[str, Any]
    parts: tuple[Part, ...]


def read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DurableError(f"{path}: missing; the checkpoint was never completed") from error
    except OSError as error:
        raise DurableError(f"{path}: {error}") from error
    return decode_manifest(content, str(path))


def decode_manifest(content: bytes, path: str) -> Manifest:
    """Decode the manifest in `content`, which was read from `path`."""
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DurableError(f"{path}: {error}") from error
    if manifest.version != VERSION:
        raise DurableError(f"{path}: format version {manifest.version}, this program reads {VERSION}")
    for part in manifest.parts:
        if not re.fullmatch(r"rank_\d{5,}\.safetensors(\.zst)?", part.file):
            raise DurableError(f"{path}: {part.file!r} is not the name of a part")
        check_age(part, manifest.epoch, manifest.step, f"{path}: {part.file}")
        for entry in part.entries:
            check_entry(entry, f"{path}: {part.file}")
    return manifest


def check_age(part: Part, epoch: int, step: int, where: str) -> None:
    """Raise `DurableError` if a part says that it belongs to another (epoch, step)."""
    if (part.epoch, part.step) not in ((None, None), (epoch, step)):
        raise DurableError(
            f"{where}: is of epoch {part.epoch} and step {part.step}, its checkpoint of epoch {epoch} and step {step}"
        )


def check_entry(entry: Entry, where: str) -> None:
    """Raise `DurableError` unless an entry has as many bytes and chunks as its piece."""
    size, chunks = entry.piece.bytes, len(entry.chunks)
    if entry.start < 0 or entry.stop - entry.start != size:
        raise DurableError(f"{where}: {entry.piece.name} has {entry.stop - entry.start} bytes instead of {size}")
    if chunks and chunks != -(-size // CHUNK):
        raise DurableError(f"{where}: {entry.piece.name} has {chunks} chunks of {CHUNK} bytes, but {size} bytes")
