"""Durable checkpoints: one safetensors file per rank and a JSON manifest, complete and verified or not there.

A folder `iter_0000100` holds

    rank_00000.safetensors      (or .safetensors.zst)  the pieces of one rank; the header describes each of them
    manifest.json               identity, free-form `meta`, and checksums of every header and tensor

It is written under a temporary name, synced and renamed, and the file `latest` beside it only ever moves forward in
(epoch, step). Nothing here is pickled, and no length from a file is believed before it is compared with the file.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import xxhash
import zstandard

from ft.contents import ITEM_SIZE, Bytes, Piece, as_bytes
from ft.errors import DurableError

VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors library refuses longer headers as well."""
CHUNK = 4 << 20
"""Bytes of a longer piece that have a checksum of their own: who needs a part of it reads whole chunks."""
_BLOCK = 4 << 20
_WRITEBACK = 16 << 20
_REPLACED = "tmp-old-"
_FINAL = re.compile(r"iter_(\d{7,})")


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One piece in a part: bytes `start ... stop` of the file's data, and their xxh3_64."""

    piece: Piece
    start: int
    stop: int
    xxh3: str
    chunks: tuple[str, ...] = ()
    """The xxh3_64 of every `CHUNK` bytes, the last one shorter; empty for a piece of one chunk."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's file."""

    file: str
    rank: int
    header_xxh3: str
    header_bytes: int
    data_bytes: int
    entries: tuple[Entry, ...]

    @property
    def compressed(self) -> bool:
        return self.file.endswith(".zst")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint is and what it holds; `meta` is its writer's own JSON."""

    version: int
    run: str
    epoch: int
    step: int
    layout: str
    meta: dict[str, Any]
    parts: tuple[Part, ...]


def write_part(
    directory: Path, rank: int, tensors: Iterable[tuple[Piece, Any]], *, meta: Mapping[str, str] | None = None,
    compress: bool = False,
) -> Part:  # fmt: skip
    """Write one rank's pieces, each with the contiguous buffer that holds its bytes, and sync the file.

    The caller makes sure that the buffers do not change meanwhile. A part of the same rank is overwritten.
    """
    pairs = sorted(tensors, key=lambda pair: (-ITEM_SIZE[pair[0].dtype], pair[0].name))
    entries, start = [], 0
    views = []
    for piece, buffer in pairs:
        view = as_bytes(buffer)
        if len(view) != piece.bytes:
            raise DurableError(f"{piece.name}: {len(view)} bytes given, its piece has {piece.bytes}")
        sums = Sums()
        sums.update(view.data)
        entries.append(Entry(piece=piece, start=start, stop=start + len(view), xxh3=sums.whole(), chunks=sums.chunks()))
        views.append(view)
        start += len(view)
    if len({entry.piece.name for entry in entries}) != len(entries):
        raise DurableError(f"rank {rank} has two pieces of one name")
    header = _header(rank, entries, dict(meta or {}))
    name = f"rank_{rank:05d}.safetensors" + (".zst" if compress else "")
    with _new_part(directory, rank, name) as file, _writer(file, compress) as out:
        out.write(header)
        under_way = 0
        for view in views:
            for at in range(0, len(view), _WRITEBACK):
                out.write(view.data[at : at + _WRITEBACK])
                under_way = begin_writeback(file, under_way)
    return _part(name, rank, header, entries)


def write_part_blocks(
    directory: Path, rank: int, pieces: Sequence[Piece], blocks: Callable[[Piece], Iterable[Any]]
) -> Part:
    """`write_part` for pieces larger than memory: `blocks(piece)` gives the bytes of each in turn, in any portions.

    Pieces lie in the file in the order given. A block may be overwritten by its maker once the next one is asked for.
    """
    # Sums are known last and stand first: as many characters are kept free for them.
    unknown = xxhash.xxh3_64_hexdigest(b"")
    entries, start = [], 0
    for piece in pieces:
        chunks = (unknown,) * -(-piece.bytes // CHUNK) if piece.bytes > CHUNK else ()
        entries.append(Entry(piece=piece, start=start, stop=start + piece.bytes, xxh3=unknown, chunks=chunks))
        start += piece.bytes
    if len({piece.name for piece in pieces}) != len(pieces):
        raise DurableError(f"rank {rank} has two pieces of one name")
    name = f"rank_{rank:05d}.safetensors"
    with _new_part(directory, rank, name) as file:
        room = len(_header(rank, entries, {}))
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
        header = _header(rank, entries, {})
        file.seek(0)
        file.write(header)
    return _part(name, rank, header, entries)


def write_manifest(
    directory: Path, *, run: str, epoch: int, step: int, layout: str, ranks: int, meta: Mapping[str, Any]
) -> Manifest:
    """Collect the headers of the parts of all `ranks` into the manifest; raises when one is missing or another's."""
    parts = []
    for rank in range(ranks):
        found = sorted(directory.glob(f"rank_{rank:05d}.safetensors*"))
        if len(found) != 1:
            raise DurableError(f"{directory}: {len(found)} parts of rank {rank}, needed exactly one")
        part = _read_header(found[0])
        if part.rank != rank:
            raise DurableError(f"{found[0]}: was written by rank {part.rank}")
        parts.append(part)
    manifest = Manifest(
        version=VERSION, run=run, epoch=epoch, step=step, layout=layout, meta=dict(meta), parts=tuple(parts)
    )
    _write_file(directory / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


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
    """The manifest in `content`, which was read from `path`."""
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, ValueError) as error:
        raise DurableError(f"{path}: {error}") from error
    if manifest.version != VERSION:
        raise DurableError(f"{path}: format version {manifest.version}, this program reads {VERSION}")
    for part in manifest.parts:
        if not re.fullmatch(r"rank_\d{5,}\.safetensors(\.zst)?", part.file):
            raise DurableError(f"{path}: {part.file!r} is not the name of a part")
        for entry in part.entries:
            _check_entry(entry, f"{path}: {part.file}")
    return manifest


def _check_entry(entry: Entry, where: str) -> None:
    size, chunks = entry.piece.bytes, len(entry.chunks)
    if entry.start < 0 or entry.stop - entry.start != size:
        raise DurableError(f"{where}: {entry.piece.name} has {entry.stop - entry.start} bytes instead of {size}")
    if chunks and chunks != -(-size // CHUNK):
        raise DurableError(f"{where}: {entry.piece.name} has {chunks} chunks of {CHUNK} bytes, but {size} bytes")


class Sums:
    """Checksums of a piece whose bytes come in blocks of any size: of all of it and of its chunks."""

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
        """As `Entry.chunks` has them."""
        found = (*self._chunks, self._chunk.hexdigest()) if self._filled else tuple(self._chunks)
        return found if len(found) > 1 else ()


def verify(directory: Path, progress: Callable[[int, int], object] | None = None) -> Manifest:
    """Read every byte of a checkpoint and compare it with the manifest; raises `DurableError` naming the file.

    `progress` is called with the bytes read so far and those of the whole checkpoint.
    """
    manifest = read_manifest(directory)
    done, total = 0, sum(part.data_bytes for part in manifest.parts)
    # Touched once: fresh memory for every block would cost more than the reading.
    memory = np.empty(_BLOCK, np.uint8)
    for part in manifest.parts:
        for entry, blocks in read_part(directory, part, memory):
            seen = xxhash.xxh3_64()
            for block in blocks:
                seen.update(block)
            _compare(directory, part, entry, seen.hexdigest())
            done += entry.stop - entry.start
            if progress is not None:
                progress(done, total)
    return manifest


def read_part(
    directory: Path, part: Part, memory: Bytes | None = None
) -> Iterator[tuple[Entry, Iterator[bytes | memoryview]]]:
    """Pieces of one part with their bytes in blocks, in the order of the file; the caller checks the sums.

    With `memory`, blocks lie in it, each overwritten by the next.
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


def read_tensor(directory: Path, part: Part, name: str, out: Bytes) -> None:
    """Read one piece of a part into `out`, a writable uint8 array of exactly its size, and check its sum."""
    entry = next((entry for entry in part.entries if entry.piece.name == name), None)
    if entry is None:
        raise DurableError(f"{directory / part.file}: holds no piece of {name}")
    if len(out) != entry.stop - entry.start:
        raise DurableError(f"{name}: {entry.stop - entry.start} bytes stored, room for {len(out)}")
    path = directory / part.file
    with _opened(path) as file:
        if part.compressed:
            _skip(file, part.header_bytes + entry.start, path)
        else:
            file.seek(part.header_bytes + entry.start)
        _fill(file, out, path)
    _compare(directory, part, entry, xxhash.xxh3_64_hexdigest(out.data))


def expand(file: IO[bytes], part: Part, entry: Entry, where: str, out: Bytes) -> None:
    """Read one piece out of a compressed part, open at its beginning, into `out`; the caller checks the sum."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as reader:
            _skip(reader, part.header_bytes + entry.start, Path(where))
            _fill(reader, out, Path(where))
    except zstandard.ZstdError as error:
        raise DurableError(f"{where}: {error}") from error


def _skip(file: Any, count: int, path: Path) -> None:
    for _ in _blocks(file, count, path):
        pass


def _fill(file: Any, out: Bytes, path: Path) -> None:
    at = 0
    for block in _blocks(file, len(out), path):
        out[at : at + len(block)] = as_bytes(block)
        at += len(block)


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is published."""
    return root / f"iter_{step:07d}"


def staging(root: Path, epoch: int, step: int, writer: str = "agents") -> Path:
    """Where it is written before that, the same on every node; agents and workers may write one step at once."""
    return root / f"tmp-{epoch}-{step}-{writer}"


@contextlib.contextmanager
def _sole_publisher(root: Path) -> Iterator[None]:
    """One process at a time gives names and takes them away; the kernel ends the claim of one that dies."""
    descriptor = os.open(root / ".publishing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def publish(tmp: Path, final: Path) -> bool:
    """Give a complete checkpoint its name and move `latest` forward to it; the caller has verified it.

    Returns False, and leaves `latest` alone, when a checkpoint of a newer (epoch, step) is the latest already. A
    checkpoint of the same step from an earlier epoch is replaced.
    """
    with _sole_publisher(final.parent):
        return _publish(tmp, final)


def _publish(tmp: Path, final: Path) -> bool:
    manifest = read_manifest(tmp)
    _sync(tmp)
    newest = latest(final.parent)
    if newest is not None:
        other = read_manifest(newest)
        forward = (manifest.epoch, manifest.step) >= (other.epoch, other.step)
        if newest == final and not forward:
            shutil.rmtree(tmp)
            return False
    else:
        forward = True
    if final.exists():
        old = final.with_name(f"{_REPLACED}{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        tmp.rename(final)
        shutil.rmtree(old)
    else:
        tmp.rename(final)
    _sync(final.parent)
    if forward:
        _write_file(final.parent / LATEST, f"{final.name}\n".encode())
    return forward


def _undo_replacement(root: Path) -> None:
    """Give a checkpoint its name back that a killed publisher took away and gave to no other."""
    replaced = [path for path in root.glob(f"{_REPLACED}*") if (path / MANIFEST).is_file()]
    if not replaced:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(root / ".publishing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Whoever holds it is alive and will finish.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in replaced:
                final = root / path.name.removeprefix(_REPLACED)
                if path.exists() and not final.exists():
                    path.rename(final)
        finally:
            os.close(descriptor)


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint: what `latest` names, or the highest (epoch, step) when that file is unusable."""
    _undo_replacement(root)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = (root / LATEST).read_text().strip()
        if _FINAL.fullmatch(name) and (root / name / MANIFEST).is_file():
            return root / name
    complete = checkpoints(root)
    return complete[-1] if complete else None


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, ascending in (epoch, step); those with an unreadable manifest are left out."""
    found = []
    for path in root.glob("iter_*"):
        if _FINAL.fullmatch(path.name):
            with contextlib.suppress(DurableError):
                manifest = read_manifest(path)
                found.append(((manifest.epoch, manifest.step), path))
    return [path for _, path in sorted(found)]


def prune(root: Path, keep: int, every: int | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints and those whose step is a multiple of `every`; returns the deleted.

    What `latest` names is never deleted. Staging folders are left to `sweep`.
    """
    if not root.is_dir():
        return []
    with _sole_publisher(root):
        return _prune(root, keep, every)


def _prune(root: Path, keep: int, every: int | None) -> list[Path]:
    names = checkpoints(root)
    spared = {*names[max(0, len(names) - keep) :], latest(root)}
    gone = []
    for path in names:
        step = read_manifest(path).step
        if path in spared or (every is not None and step % every == 0):
            continue
        # Renamed first: a reader must never meet half of a checkpoint under its final name.
        doomed = path.with_name(f"tmp-pruned-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
        gone.append(path)
    return gone


def sweep(root: Path) -> list[Path]:
    """Delete what interrupted writers left; only before anyone writes to `root`."""
    _undo_replacement(root)
    left = [path for path in root.glob("tmp-*") if path.is_dir()]
    for path in left:
        shutil.rmtree(path)
    return left


def _header(rank: int, entries: list[Entry], meta: dict[str, str]) -> bytes:
    table: dict[str, Any] = {
        "__metadata__": {
            **meta,
            "keepwarm.rank": str(rank),
            "keepwarm.pieces": msgspec.json.encode(
                {e.piece.name: _Note(e.piece, e.xxh3, e.chunks) for e in entries}
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


def begin_writeback(file: IO[bytes], start: int) -> int:
    """Let the disk work on bytes from `start` while more are made; returns from where on there are new ones.

    Without it the disk would idle until the sync at the end, which then takes as long as the writing did.
    """
    stop = file.tell()
    if stop - start < _WRITEBACK or not hasattr(os, "posix_fadvise"):
        return start
    file.flush()
    # Linux writes dirty pages out before it drops them, without waiting.
    os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
    return stop


@contextlib.contextmanager
def _new_part(directory: Path, rank: int, name: str) -> Iterator[IO[bytes]]:
    """A file that takes the place of any part of this rank, and its name, once it is whole and synced."""
    path = directory / f".{name}"
    for other in (*directory.glob(f"rank_{rank:05d}.safetensors*"), path):
        other.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    path.rename(directory / name)


def _part(name: str, rank: int, header: bytes, entries: list[Entry]) -> Part:
    return Part(
        file=name,
        rank=rank,
        header_xxh3=xxhash.xxh3_64_hexdigest(header),
        header_bytes=len(header),
        data_bytes=entries[-1].stop if entries else 0,
        entries=tuple(entries),
    )


class _Note(msgspec.Struct, frozen=True, array_like=True):
    """What a part's header says of a piece."""

    piece: Piece
    xxh3: str
    chunks: tuple[str, ...] = ()


class _Slice(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _read_header(path: Path) -> Part:
    with _opened(path) as file:
        length = int.from_bytes(_exactly(file, 8, path), "little")
        bound = HEADER_LIMIT if path.suffix == ".zst" else min(HEADER_LIMIT, path.stat().st_size - 8)
        if not 0 < length <= bound:
            raise DurableError(f"{path}: claims a header of {length} bytes, at most {bound} can be")
        text = _exactly(file, length, path)
    try:
        table = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        notes = msgspec.json.decode(table.pop("__metadata__"), type=dict[str, str])
        pieces = msgspec.json.decode(notes["keepwarm.pieces"], type=dict[str, _Note])
        entries = []
        for name, raw in table.items():
            start, stop = msgspec.json.decode(raw, type=_Slice).data_offsets
            note = pieces[name]
            entry = Entry(piece=note.piece, start=start, stop=stop, xxh3=note.xxh3, chunks=note.chunks)
            _check_entry(entry, str(path))
            entries.append(entry)
        entries.sort(key=lambda entry: (entry.start, entry.stop))
        rank = int(notes["keepwarm.rank"])
    except (msgspec.DecodeError, KeyError, ValueError) as error:
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
    )


@contextlib.contextmanager
def _writer(file: IO[bytes], compress: bool) -> Iterator[Any]:
    if not compress:
        yield file
        return
    with zstandard.ZstdCompressor(level=1, write_checksum=True).stream_writer(file, closefd=False) as out:
        yield out


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            if path.suffix == ".zst":
                with zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as reader:
                    yield io.BufferedReader(reader, _BLOCK)
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
                block = file.read(min(size, _BLOCK))
            else:
                block = memory.data[: file.readinto(memory.data[: min(size, len(memory))])]
        except zstandard.ZstdError as error:
            raise DurableError(f"{path}: {error}") from error
        if not block:
            raise DurableError(f"{path}: ends {size} bytes too early")
        size -= len(block)
        yield block


def _compare(directory: Path, part: Part, entry: Entry, seen: str) -> None:
    if seen != entry.xxh3:
        raise DurableError(f"{directory / part.file}: {entry.piece.name} has checksum {seen}, written was {entry.xxh3}")


def _write_file(path: Path, content: bytes) -> None:
    """Replace a file at once: readers see the old content or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
