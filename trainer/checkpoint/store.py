"""Read checkpoints from a local directory or any fsspec URL, fetching only the byte ranges that are needed.

A part of a piece is read in whole chunks, each checked against its own checksum; the rest of the file is not touched.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import DurableError
from keepwarm.ft.format.manifest import CHUNK, MANIFEST, Entry, Part, decode_manifest
from keepwarm.ft.format.reader import expand
from keepwarm.trainer.convert.native import with_older
from keepwarm.trainer.job.url import is_remote, is_url, local_path


class Store(Protocol):
    """The files of one checkpoint."""

    name: str
    """Name for messages."""
    block: int | None
    """Preferred bytes per read: few if they are hashed while still in the processor cache."""

    def whole(self, file: str) -> bytes:
        """Return the content of a small file."""

    def fill(self, file: str, start: int, out: Bytes) -> None:
        """Fill `out` with the bytes of a file from `start` on."""

    def stream(self, file: str) -> contextlib.AbstractContextManager[Any]:
        """Open a file for reading from its start."""


class LocalStore:
    """A folder; files stay open until `close`."""

    block: int | None = 4 << 20

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._descriptors: dict[str, int] = {}

    def whole(self, file: str) -> bytes:
        return (self._path / file).read_bytes()

    def fill(self, file: str, start: int, out: Bytes) -> None:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._path / file, os.O_RDONLY)
        at = 0
        while at < len(out):
            count = os.preadv(self._descriptors[file], [out.data[at:]], start + at)
            if count == 0:
                raise DurableError(f"{self._path / file}: ends {len(out) - at} bytes too early")
            at += count

    def stream(self, file: str) -> contextlib.AbstractContextManager[Any]:
        return (self._path / file).open("rb")

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class UrlStore:
    """A folder on any fsspec filesystem; every read is one ranged request."""

    block: int | None = None

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._files, self._path = filesystem(self.name)

    def whole(self, file: str) -> bytes:
        content: bytes = self._files.cat_file(f"{self._path}/{file}")
        return content

    def fill(self, file: str, start: int, out: Bytes) -> None:
        content = self._files.cat_file(f"{self._path}/{file}", start=start, end=start + len(out))
        if len(content) != len(out):
            raise DurableError(f"{self.name}/{file}: ends {len(out) - len(content)} bytes too early")
        out[:] = np.frombuffer(content, np.uint8)

    def stream(self, file: str) -> contextlib.AbstractContextManager[Any]:
        opened: contextlib.AbstractContextManager[Any] = self._files.open(f"{self._path}/{file}", "rb")
        return opened

    def close(self) -> None:
        """Do nothing: no files are kept open."""


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL or local path, and the path in it.

    Raises:
        DurableError: the protocol is unknown, or its package is missing; says how to install it.
    """
    import fsspec  # type: ignore[import-untyped]

    if not is_url(url):
        return fsspec.filesystem("file"), url.rstrip("/")
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = "pip install 'keepwarm[s3]'" if url.startswith(("s3://", "s3a://")) else "install the package it names"
        raise DurableError(f"{url}: {error}: {extra}") from error
    except ValueError as error:
        raise DurableError(f"{url}: {error}") from error
    return files, str(path).rstrip("/")


class Checkpoint:
    """An open checkpoint: its manifest, and pieces or parts of pieces from its files."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = store.name
        with self._explained(MANIFEST):
            content = store.whole(MANIFEST)
        self.manifest = decode_manifest(content, f"{store.name}/{MANIFEST}")

    def span(self, part: Part, entry: Entry, start: int, stop: int) -> tuple[int, Bytes]:
        """Return bytes `start ... stop` of a piece, including bytes read only to verify them, as (first byte,
        bytes)."""
        size = entry.stop - entry.start
        if not entry.chunks or part.compressed:
            out = np.empty(size, np.uint8)
            self.piece(part, entry, out)
            return 0, out
        first, last = start // CHUNK, -(-stop // CHUNK)
        low, high = first * CHUNK, min(last * CHUNK, size)
        out = np.empty(high - low, np.uint8)
        with self._explained(part.file):
            self._store.fill(part.file, part.header_bytes + entry.start + low, out)
        for index in range(first, last):
            chunk = out[index * CHUNK - low : (index + 1) * CHUNK - low]
            self._compare(part, entry, xxhash.xxh3_64_hexdigest(chunk.data), entry.chunks[index])
        return low, out

    def piece(self, part: Part, entry: Entry, out: Bytes) -> None:
        """Read a whole piece into `out` and verify it."""
        seen = xxhash.xxh3_64()
        with self._explained(part.file):
            if part.compressed:
                with self._store.stream(part.file) as file:
                    expand(file, part, entry, f"{self.name}/{part.file}", out)
                seen.update(out.data)
            else:
                step = self._store.block or max(len(out), 1)
                for at in range(0, len(out), step):
                    block = out[at : at + step]
                    self._store.fill(part.file, part.header_bytes + entry.start + at, block)
                    seen.update(block.data)
        self._compare(part, entry, seen.hexdigest(), entry.xxh3)

    def _compare(self, part: Part, entry: Entry, seen: str, written: str) -> None:
        if seen != written:
            raise DurableError(
                f"{self.name}/{part.file}: {entry.piece.name} has checksum {seen}, written was {written}"
            )

    @contextlib.contextmanager
    def _explained(self, file: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            more = "; the checkpoint was never completed" if file == MANIFEST else ""
            raise DurableError(f"{self.name}/{file}: missing{more}") from error
        except OSError as error:
            raise DurableError(f"{self.name}/{file}: {error.strerror or error}") from error


@contextlib.contextmanager
def opened(where: str | Path) -> Iterator[Checkpoint]:
    """Open the checkpoint in a local folder or at a URL.

    Raises:
        DurableError: it is missing or damaged, or its protocol is not installed; names the file.
    """
    store = UrlStore(str(where)) if is_remote(where) else LocalStore(local_path(where))
    try:
        yield Checkpoint(store)
    except DurableError as error:
        raise DurableError(str(error) if is_remote(where) else with_older(error, local_path(where))) from error
    finally:
        store.close()
