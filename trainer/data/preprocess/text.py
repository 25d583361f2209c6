"""Documents in text files: JSON lines or plain text, optionally compressed. Torch-free."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from keepwarm.trainer.data.preprocess.prefix import Prefix, prefix_of
from keepwarm.trainer.data.preprocess.score import Keep, score_of
from keepwarm.trainer.errors import DataError

SUFFIXES = (".jsonl", ".txt")
COMPRESSED = (".gz", ".zst")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of a text file that is tokenized on its own."""

    path: str
    json_lines: bool
    first_line: int
    """Number of its first line in the file, from 1."""
    payload: bytes
    """Whole JSON lines, or one whole plain-text document."""
    read_bytes: int
    """Bytes of the file on disk that have been read up to the end of this part."""
    keep: Keep | None = None
    """Selection of its documents; None: all."""
    prefix: Prefix | None = None
    """Text to put before each of them."""


def is_text(path: str | Path) -> bool:
    """Return whether a path names a text file: `.jsonl` or `.txt`, optionally with `.gz` or `.zst`."""
    return _kind(Path(path)) in SUFFIXES


def parts(path: Path, part_bytes: int, keep: Keep | None = None, prefix: Prefix | None = None) -> Iterator[TextPart]:
    """Yield the file in parts: JSON lines in runs of about `part_bytes`; plain text whole, since it is one document.

    Raises:
        DataError: the file is missing, of unknown kind, truncated or not what its name says; names it.
    """
    if _kind(path) not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{path}: unknown kind of text file; known are {kinds}, optionally with .gz or .zst")
    if keep is not None and _kind(path) != ".jsonl":
        raise DataError(f"{path}: plain text has no scores; --score-key is for JSON lines")
    if prefix is not None and _kind(path) != ".jsonl":
        raise DataError(f"{path}: plain text has no fields; --prefix and --control-key are for JSON lines")
    try:
        with path.open("rb") as raw:
            unfiltered = _json_parts(path, raw, part_bytes) if _kind(path) == ".jsonl" else _plain(path, raw)
            yield from (replace(part, keep=keep, prefix=prefix) for part in unfiltered)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged or truncated: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def documents(part: TextPart, text_key: str) -> list[str]:
    """Return the texts of a part without prefixes; otherwise like `prefixed_documents`."""
    return [text for _, text in prefixed_documents(part, text_key)]


def prefixed_documents(part: TextPart, text_key: str) -> list[tuple[str, str]]:
    """Return prefix and text of each document of a part, omitting those that are empty or not selected.

    Raises:
        DataError: a line is not a JSON object with a string at `text_key`; names file and line.
    """
    if not part.json_lines:
        return [("", text)] if (text := _decoded(part.payload, part.path)) else []
    pairs = (_document(value, where, text_key, part) for where, value in json_values(part))
    return [(prefix, text) for prefix, text in pairs if text]


def json_values(part: TextPart) -> Iterator[tuple[str, Any]]:
    """Yield `FILE:LINE` and the value of every JSON line of a part; blank lines are skipped.

    Raises:
        DataError: a line is not UTF-8 or not JSON; names file and line.
    """
    for number, line in enumerate(part.payload.split(b"\n"), part.first_line):
        if line.strip():
            where = f"{part.path}:{number}"
            try:
                value = json.loads(_decoded(line, where))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from None
            yield where, value


def _document(value: Any, where: str, text_key: str, part: TextPart) -> tuple[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
        keys = f"; its keys are {sorted(value)}" if isinstance(value, dict) else ""
        raise DataError(f"{where}: not an object with a string at {text_key!r} (--text-key){keys}")
    if part.keep is not None and score_of(value, part.keep.key, where) < part.keep.least:
        return "", ""
    text: str = value[text_key]
    prefix = "" if part.prefix is None else prefix_of(value, text, part.prefix, where)
    try:
        (prefix + text).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not text: {error}") from None
    return prefix, text


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from None


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def _json_parts(path: Path, raw: BinaryIO, part_bytes: int) -> Iterator[TextPart]:
    pending, line = bytearray(), 1
    for chunk in _chunks(path, raw):
        pending += chunk
        while len(pending) >= part_bytes and (end := pending.find(b"\n", part_bytes - 1) + 1):
            payload = bytes(pending[:end])
            del pending[:end]
            yield TextPart(str(path), True, line, payload, raw.tell())
            line += payload.count(b"\n")
    if pending:
        yield TextPart(str(path), True, line, bytes(pending), raw.tell())


def _plain(path: Path, raw: BinaryIO) -> Iterator[TextPart]:
    yield TextPart(str(path), False, 1, b"".join(_chunks(path, raw)), raw.tell())


def _chunks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    match path.suffix:
        case ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                while chunk := stream.read(_READ_BYTES):
                    yield chunk
        case ".zst":
            yield from _zstandard_chunks(raw)
        case _:
            while chunk := raw.read(_READ_BYTES):
                yield chunk


def _zstandard_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """Yield all frames of the file; zstandard's own reader mistakes a truncated frame for the end of the data."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    open_frame = True
    while chunk := raw.read(_READ_BYTES // 16):
        while chunk:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
        open_frame = not frame.eof
    if open_frame:
        raise EOFError("the file ends inside a zstandard frame")
