"""Read a native checkpoint as whole tensors, whatever layout wrote it, verified against its manifest."""

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import ITEM_SIZE, Piece, move_bytes, plan
from keepwarm.ft.format.manifest import MANIFEST, Entry, Part, read_manifest
from keepwarm.ft.format.reader import read_part
from keepwarm.trainer.convert.safetensors_file import read_exactly
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.url import local_path

PREFIX = "model."
"""Prefix of parameter names; other names belong to the optimizer and to ranks."""


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` refers to: itself, or the newest one of a run folder or of its `checkpoints`.

    Raises:
        CheckpointError: there is none.
    """
    path = local_path(path)
    if (path / MANIFEST).is_file():
        return path
    for root in (path, RunFolder(path).checkpoints):
        found = publication.latest(root) if root.is_dir() else None
        if found is not None:
            return found
    if len(path.parts) > 1 and path.parts[0].endswith(":"):
        raise CheckpointError(f"{path}: this is a URL; keepwarm checkpoint copy brings the checkpoint here")
    raise CheckpointError(f"{path}: neither a checkpoint ({MANIFEST}) nor a folder with checkpoints in it")


def with_older(error: Exception, path: Path) -> str:
    """Return the message of an error; if it is about a file of the checkpoint `path`, with the newest older checkpoint
    beside it whose files are complete.
    """
    older = _older(path) if str(error).startswith(f"{path}/") else None
    if older is None:
        return str(error)
    return (
        f"{error}; the checkpoint before it, {older}, has all of its files: give that one, or move {path} elsewhere to "
        "resume from it"
    )


def _older(path: Path) -> Path | None:
    beside = publication.checkpoints(path.parent)
    before = beside[: beside.index(path)] if path in beside else [one for one in beside if one.name < path.name]
    return next((one for one in reversed(before) if _has_all_files(one)), None)


def _has_all_files(path: Path) -> bool:
    try:
        for part in read_manifest(path).parts:
            size = (path / part.file).stat().st_size
            if size < 1 or (not part.compressed and size != part.header_bytes + part.data_bytes):
                return False
    except (OSError, FtError):
        return False
    return True


@dataclass(kw_only=True)
class Tensor:
    """One global tensor and its stored pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[tuple[Part, Entry]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(kw_only=True)
class _Progress:
    """The read position in a tensor, and the source of its bytes."""

    read: int
    seen: Any
    whole: tuple[Part, Entry] | None
    assembled: Bytes | None


class NativeCheckpoint:
    """An open checkpoint, as a `Source` of tensors by global name; a context manager that closes its files.

    Tensors are read from start to end; the last read raises if a checksum is wrong. A tensor stored in several pieces
    is assembled in memory, with one piece at a time next to the whole. Compressed parts are expanded into unnamed files
    in `scratch`.
    """

    def __init__(self, path: Path, scratch: Path | None = None) -> None:
        self.path = find_checkpoint(path)
        try:
            self.manifest = read_manifest(self.path)
        except FtError as error:
            raise CheckpointError(with_older(error, self.path)) from error
        self._scratch = scratch
        self._progress: dict[str, _Progress] = {}
        self._descriptors: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        for part in self.manifest.parts:
            for entry in part.entries:
                self._add(part, entry)

    def __enter__(self) -> "NativeCheckpoint":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._progress.clear()
        if isinstance(error, CheckpointError) and (message := with_older(error, self.path)) != str(error):
            raise CheckpointError(message) from error

    def dtype(self, name: str) -> str:
        return self._tensor(name).dtype

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Read as `streaming.Source` does; `start` is where the last read of this tensor ended, or 0."""
        tensor = self._tensor(name)
        if start == 0:
            self._progress[name] = self._begin(name, tensor)
        progress = self._progress[name]
        if start != progress.read:
            raise ValueError(f"{name}: read at {start} after {progress.read}")
        if progress.assembled is not None:
            out[:] = progress.assembled[start : start + len(out)]
        elif progress.whole is not None:
            part, entry = progress.whole
            at = entry.start if part.compressed else part.header_bytes + entry.start
            read_exactly(self._descriptor(part), self.path / part.file, at + start, out)
            progress.seen.update(out)
        progress.read += len(out)
        if progress.read == tensor.bytes:
            self._end(name)

    def blocks(self, name: str, size: int) -> Iterator[Bytes]:
        """Yield a whole tensor in blocks of `size` bytes, each of which overwrites the last."""
        total, block = self._tensor(name).bytes, np.empty(size, np.uint8)
        for start in range(0, total, size):
            part = block[: min(size, total - start)]
            self.read(name, start, part)
            yield part

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return self.tensors[name]

    def _add(self, part: Part, entry: Entry) -> None:
        piece = entry.piece
        tensor = self.tensors.setdefault(piece.name, Tensor(dtype=piece.dtype, shape=piece.global_shape))
        if (tensor.dtype, tensor.shape) != (piece.dtype, piece.global_shape):
            raise CheckpointError(
                f"{self.path / part.file}: {piece.name} is {piece.dtype}{list(piece.global_shape)} here, "
                f"{tensor.dtype}{list(tensor.shape)} in another part"
            )
        tensor.pieces.append((part, entry))

    def _begin(self, name: str, tensor: Tensor) -> _Progress:
        whole = next((stored for stored in tensor.pieces if stored[1].piece.bytes == tensor.bytes), None)
        assembled = self._assemble(name, tensor) if whole is None else None
        return _Progress(read=0, seen=xxhash.xxh3_64(), whole=whole, assembled=assembled)

    def _end(self, name: str) -> None:
        progress = self._progress.pop(name)
        if progress.whole is not None:
            part, entry = progress.whole
            if progress.seen.hexdigest() != entry.xxh3:
                raise CheckpointError(f"{self.path / part.file}: the bytes of {name} do not match their checksum")

    def _assemble(self, name: str, tensor: Tensor) -> Bytes:
        target = Piece(
            name=name,
            global_shape=tensor.shape,
            offsets=(0,) * len(tensor.shape),
            shape=tensor.shape,
            dtype=tensor.dtype,
        )
        out = np.empty(tensor.bytes, np.uint8)
        try:
            moves = plan(target, [entry.piece for _, entry in tensor.pieces])
        except FtError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        for source in sorted({move.source for move in moves}):
            part, entry = tensor.pieces[source]
            held = np.empty(entry.piece.bytes, np.uint8)
            at = entry.start if part.compressed else part.header_bytes + entry.start
            read_exactly(self._descriptor(part), self.path / part.file, at, held)
            if xxhash.xxh3_64_hexdigest(held.data) != entry.xxh3:
                raise CheckpointError(f"{self.path / part.file}: the bytes of {name} do not match their checksum")
            for move in moves:
                if move.source == source:
                    start, stop = move.span
                    move_bytes(move, held[start:stop], out)
        return out

    def _descriptor(self, part: Part) -> int:
        """Open a file with the data of a part; without its header if the part was compressed."""
        if part.file not in self._descriptors:
            try:
                self._descriptors[part.file] = (
                    self._expanded(part) if part.compressed else os.open(self.path / part.file, os.O_RDONLY)
                )
            except FtError as error:
                raise CheckpointError(str(error)) from error
            except OSError as error:
                raise CheckpointError(f"{self.path / part.file}: {error.strerror}") from error
        return self._descriptors[part.file]

    def _expanded(self, part: Part) -> int:
        with tempfile.TemporaryFile(dir=self._scratch) as file:
            for _, blocks in read_part(self.path, part):
                for block in blocks:
                    file.write(block)
            file.flush()
            return os.dup(file.fileno())
