"""Documents in text files: JSON lines or plain text, optionally compressed. Torch-free."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from keepwarm.foreign_json import BOM, decode_utf8, parse_json, shown_keys
from keepwarm.trainer.data.preprocess import compressed
from keepwarm.trainer.data.preprocess.prefix import Prefix, prefix_of
from keepwarm.trainer.data.preprocess.score import Keep, score_of
from keepwarm.trainer.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_LINES, ".txt")
PART_BYTES = 4 << 20
"""Bytes of JSON lines that are read and tokenized at a time."""
DOCUMENT_BYTES = 1 << 30
"""Limit of a document: of a JSON line, or of a plain-text file."""

_Read = TypeVar("_Read")


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
    selection: "Selection" = field(default_factory=lambda: Selection())
    """Which of its documents to take, and how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which documents of JSON lines to take."""

    keep: Keep | None = None
    """Selects documents by score; None: all."""
    prefix: Prefix | None = None
    """Text to put before each document."""
    skip_bad_lines: bool = False
    """Leave out lines that are no document, instead of refusing the file."""


class BadLine(NamedTuple):
    """A line that was left out."""

    offset: int
    """Number of lines before it in its part."""
    reason: str


EVERYTHING = Selection()


def is_text(path: str | Path) -> bool:
    """Return whether a path names a text file: `.jsonl`, `.ndjson`, `.json` or `.txt`, optionally with `.gz` or
    `.zst`, in any case."""
    return _kind(Path(path)) in SUFFIXES


def parts(path: Path, part_bytes: int, selection: Selection = EVERYTHING) -> Iterator[TextPart]:
    """Yield the file in parts: JSON lines in runs of about `part_bytes`; plain text whole, since it is one document.

    Raises:
        DataError: the file is missing, of unknown kind, truncated or not what its name says; names it.
    """
    kind = _kind(path)
    if kind not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{path}: unknown kind of text file; known are {kinds}, optionally with .gz or .zst")
    if selection.keep is not None and kind not in JSON_LINES:
        raise DataError(f"{path}: plain text has no scores; --score-key is for JSON lines")
    if selection.prefix is not None and kind not in JSON_LINES:
        raise DataError(f"{path}: plain text has no fields; --prefix and --control-key are for JSON lines")
    try:
        with path.open("rb") as raw:
            unfiltered = _json_parts(path, raw, part_bytes) if kind in JSON_LINES else _plain(path, raw)
            yield from (replace(part, selection=selection) for part in unfiltered)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def documents(part: TextPart, text_key: str) -> list[str]:
    """Return the texts of a part without prefixes; otherwise like `prefixed_documents`."""
    return [text for _, text in prefixed_documents(part, text_key)[0]]


def prefixed_documents(part: TextPart, text_key: str) -> tuple[list[tuple[str, str]], list[BadLine]]:
    """Return prefix and text of each document of a part, and the lines that were left out as bad; documents that are
    empty or not selected are neither.

    Raises:
        DataError: a line is not a JSON object with a string at `text_key`; names file and line.
    """
    if not part.json_lines:
        try:
            text = decode_utf8(part.payload)
        except ValueError as error:
            raise DataError(f"{part.path}: {error}") from None
        return ([("", text)] if text else []), []
    pairs, bad = read_lines(part, lambda value, where: _document(value, where, text_key, part.selection))
    return [(prefix, text) for prefix, text in pairs if text], bad


def read_lines(part: TextPart, read: Callable[[Any, str], _Read]) -> tuple[list[_Read], list[BadLine]]:
    """Return `read(value, "FILE:LINE")` of every JSON line of a part, and the lines that were left out as bad; blank
    lines are skipped.

    Raises:
        DataError: a line is not UTF-8 or not JSON, or `read` raises it, unless bad lines are skipped; names the line.
    """
    found, bad = [], []
    for offset, line in enumerate(part.payload.split(b"\n")):
        if not line.removeprefix(BOM).strip():
            continue
        where = f"{part.path}:{part.first_line + offset}"
        try:
            found.append(read(_value(line, where), where))
        except DataError as error:
            if not part.selection.skip_bad_lines:
                raise
            bad.append(BadLine(offset, str(error).removeprefix(f"{where}: ")))
    return found, bad


def sentences(part: TextPart, bad: Sequence[BadLine]) -> list[str]:
    """Return what is wrong with lines of a part, with file and line."""
    return [f"{part.path}:{part.first_line + one.offset}: {one.reason}" for one in bad]


def _value(line: bytes, where: str) -> Any:
    try:
        return parse_json(line, unique_keys=False, whole=False)
    except ValueError as error:
        array = "; a JSON file is read line by line, one document in each" if line.strip() in (b"[", b"{") else ""
        raise DataError(f"{where}: {error}{array}") from None


def _document(value: Any, where: str, text_key: str, selection: Selection) -> tuple[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
        keys = f"; its keys are {shown_keys(value)}" if isinstance(value, dict) else ""
        raise DataError(f"{where}: not an object with a string at {text_key!r} (--text-key){keys}")
    if selection.keep is not None and score_of(value, selection.keep.key, where) < selection.keep.least:
        return "", ""
    text: str = value[text_key]
    prefix = "" if selection.prefix is None else prefix_of(value, text, selection.prefix, where)
    try:
        (prefix + text).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: not text: half of a surrogate pair stands alone") from None
    return prefix, text


def _kind(path: Path) -> str:
    packed = path.suffix.lower() in compressed.SUFFIXES
    return (path.with_suffix("") if packed else path).suffix.lower()


def _json_parts(path: Path, raw: BinaryIO, part_bytes: int) -> Iterator[TextPart]:
    pending, searched, line = bytearray(), 0, 1
    for chunk in _text_chunks(path, raw):
        pending += chunk
        while end := pending.find(b"\n", max(part_bytes - 1, searched)) + 1:
            payload = bytes(pending[:end])
            del pending[:end]
            searched = 0
            yield TextPart(str(path), True, line, payload, raw.tell())
            line += payload.count(b"\n")
        searched = len(pending)
        _check_length(path, len(pending) - part_bytes)
    if pending:
        yield TextPart(str(path), True, line, bytes(pending), raw.tell())


def _plain(path: Path, raw: BinaryIO) -> Iterator[TextPart]:
    whole = bytearray()
    for chunk in _text_chunks(path, raw):
        whole += chunk
        _check_length(path, len(whole))
    yield TextPart(str(path), False, 1, bytes(whole), raw.tell())


def _text_chunks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of a file, unless it begins as files in another encoding do."""
    first = True
    for chunk in compressed.chunks(path, raw):
        if first and chunk:
            first = False
            if chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{path}: UTF-16, not UTF-8: convert it, as with `iconv -f UTF-16 -t UTF-8`")
            head = chunk[:4096]
            if len(head) >= 8 and head.count(0) * 3 > len(head):
                raise DataError(f"{path}: full of NUL bytes: UTF-16 or a binary file, while text is read in UTF-8")
        yield chunk


def _check_length(path: Path, length: int) -> None:
    if length > DOCUMENT_BYTES:
        raise DataError(f"{path}: a document of more than {DOCUMENT_BYTES:,} bytes, the limit: split it")
