"""The `.bin`/`.idx` format of Megatron's token files, read and written without Megatron Core.

`PREFIX.bin` holds the tokens of all sequences, concatenated. `PREFIX.idx` holds, little-endian and unaligned: magic (9
bytes), version (uint64), dtype code (uint8), number of sequences and of document boundaries (uint64 each), then int32
sequence lengths, int64 byte offsets into `.bin`, and int64 document boundaries as sequence numbers. Boundaries `i` and
`i + 1` enclose the sequences of document `i`.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from keepwarm.trainer.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Integer types by the format's code; codes 6 and 7 are floats, which cannot hold tokens."""
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
LONGEST = 2**31 - 1
"""Maximum tokens of one sequence, whose length is an int32."""

_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an `.idx` file, checked against the size of the file."""

    dtype: np.dtype[Any]
    sequences: int
    boundaries: int


class TokenFileReader:
    """One `PREFIX.bin` and `PREFIX.idx`, memory-mapped.

    Opening checks both files against each other: the index is read once, in pieces, so that memory does not grow with
    it. The maps, and arrays that `tokens` returns, stay valid as long as they are referenced.

    Raises:
        DataError: a file is missing, empty, truncated, foreign or contradicts the other; names it.
    """

    def __init__(self, bin_path: Path, idx_path: Path) -> None:
        self.header = header = _checked_header(bin_path, idx_path)
        begin = _HEADER.size
        self.lengths = _mapped(idx_path, "<i4", begin, header.sequences)
        begin += self.lengths.nbytes
        self.offsets = _mapped(idx_path, "<i8", begin, header.sequences)
        begin += self.offsets.nbytes
        self.boundaries = _mapped(idx_path, "<i8", begin, header.boundaries)
        self.count = self._checked_sequences(idx_path)
        """Tokens in `.bin`."""
        _check_bin_size(bin_path, self.count * header.dtype.itemsize, idx_path)
        self._check_boundaries(idx_path)
        self._tokens = _mapped(bin_path, header.dtype, 0, self.count)

    @property
    def documents(self) -> int:
        return self.header.boundaries - 1

    def tokens(self, start: int, count: int) -> npt.NDArray[Any]:
        """Return a read-only view of `count` tokens from token `start` of the file on, in the file's type."""
        return self._tokens[start : start + count]

    def first_token(self, sequence: int) -> int:
        """Return the number of the first token of a sequence; for the one past the last, the number of tokens."""
        if sequence >= self.header.sequences:
            return self.count
        return int(self.offsets[sequence]) // self.header.dtype.itemsize

    def _checked_sequences(self, idx_path: Path) -> int:
        total, itemsize = 0, self.header.dtype.itemsize
        for low in range(0, self.header.sequences, _CHUNK):
            part = self.lengths[low : low + _CHUNK].astype(np.int64)
            ends = total + np.cumsum(part)
            if part.min() < 0 or not np.array_equal(self.offsets[low : low + _CHUNK], (ends - part) * itemsize):
                raise DataError(f"{idx_path}: damaged: the sequences from number {low} on do not follow one another")
            total = int(ends[-1])
        return total

    def _check_boundaries(self, idx_path: Path) -> None:
        last = 0
        for low in range(0, self.header.boundaries, _CHUNK):
            part = self.boundaries[low : low + _CHUNK].astype(np.int64)
            if (np.diff(part, prepend=last) < 0).any() or (low == 0 and part[0] != 0):
                raise DataError(f"{idx_path}: damaged: the document boundaries from number {low} on are out of order")
            last = int(part[-1])
        if last != self.header.sequences:
            raise DataError(f"{idx_path}: damaged: its documents end at sequence {last} of {self.header.sequences}")


class TokenFileWriter:
    """Write a token file document by document, with the bytes that Megatron Core's builder writes.

    A context manager that closes `.bin`; `finish` writes `.idx` and makes the file readable. The lengths of all
    sequences and the ends of all documents stay in memory until then, 8 bytes each.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, bin_path: Path, dtype: npt.DTypeLike) -> None:
        """`dtype`: one of `DTYPES`; KeyError for any other."""
        self._dtype = np.dtype(dtype)
        self._code = CODES[self._dtype]
        self._lengths = array("q")
        self._boundaries = array("q", [0])
        self._stream = bin_path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int]) -> None:
        """Append a document, split into sequences of `lengths` tokens; an empty document has no sequence.

        Raises:
            ValueError: the lengths do not sum up to the document, or one is negative or beyond `LONGEST`.
        """
        stored = np.asarray(tokens, self._dtype)
        if sum(lengths) != stored.size or not all(0 <= length <= LONGEST for length in lengths):
            raise ValueError(f"sequences of {list(lengths)} tokens in a document of {stored.size}")
        self._stream.write(stored.tobytes())
        self._lengths.extend(lengths)
        self._boundaries.append(len(self._lengths))

    def finish(self, idx_path: Path) -> None:
        """Close `.bin` and write `.idx`."""
        self._stream.close()
        write_index(idx_path, self._dtype, self._lengths, self._boundaries)


def write_index(idx_path: Path, dtype: npt.DTypeLike, lengths: Sequence[int], boundaries: Sequence[int]) -> None:
    """Write an `.idx` file.

    Args:
        dtype: type of the tokens in `.bin`, one of `DTYPES`.
        lengths: tokens of each sequence.
        boundaries: sequence at which each document begins, and at the end the number of sequences.
    """
    sizes = np.asarray(lengths, np.int64)
    offsets = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    with idx_path.open("wb") as stream:
        stream.write(_HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype)], len(sizes), len(boundaries)))
        stream.write(sizes.astype("<i4").tobytes())
        stream.write(offsets.astype("<i8").tobytes())
        stream.write(np.asarray(boundaries, "<i8").tobytes())


def dtype_for(vocabulary_size: int) -> type[np.uint16] | type[np.int32]:
    """Return Megatron's choice of type for a vocabulary."""
    return np.uint16 if vocabulary_size < 65_500 else np.int32


def _mapped(path: Path, dtype: npt.DTypeLike, begin: int, count: int) -> npt.NDArray[Any]:
    """Return a plain array over a read-only map, which lives as long as the array; `memmap` itself slices slowly."""
    return np.asarray(np.memmap(path, dtype, "r", begin, count))


def _checked_header(bin_path: Path, idx_path: Path) -> Header:
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if not path.stat().st_size:
            raise DataError(f"{path}: the file is empty")
    with idx_path.open("rb") as stream:
        raw = stream.read(_HEADER.size)
    if not raw.startswith(MAGIC[: len(raw)]):
        raise DataError(f"{idx_path}: not a Megatron index (it begins with {raw[:9]!r}, not {MAGIC!r})")
    if len(raw) < _HEADER.size:
        raise DataError(f"{idx_path}: truncated: {len(raw)} bytes, the header alone has {_HEADER.size}")
    _, version, code, sequences, boundaries = _HEADER.unpack(raw)
    if version != VERSION:
        raise DataError(f"{idx_path}: index version {version}, only version {VERSION} is known")
    if code not in DTYPES:
        raise DataError(f"{idx_path}: dtype code {code} is not an integer type of Megatron's")
    expected, actual = _HEADER.size + 12 * sequences + 8 * boundaries, idx_path.stat().st_size
    if actual == expected + sequences and sequences:
        raise DataError(f"{idx_path}: a multimodal index; only text is read")
    if actual != expected:
        word = "truncated" if actual < expected else "too long"
        raise DataError(
            f"{idx_path}: {word}: {actual} bytes, {expected} follow from its {sequences} sequences and "
            f"{boundaries} document boundaries"
        )
    if not sequences or boundaries < 2:
        raise DataError(f"{idx_path}: contains no document")
    return Header(np.dtype(DTYPES[code]), sequences, boundaries)


def _check_bin_size(bin_path: Path, expected: int, idx_path: Path) -> None:
    size = bin_path.stat().st_size
    if size != expected:
        word = "truncated" if size < expected else "too long"
        raise DataError(f"{bin_path}: {word}: {size} bytes, {expected} follow from {idx_path.name}")
