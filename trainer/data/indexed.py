"""Megatron's `.bin`/`.idx` token files, opened through Megatron Core and checked before anything trusts them.

Layout of an `.idx` file: magic, version, dtype code, counts of sequences and of document boundaries, then int32
sequence lengths, int64 byte offsets into `.bin`, and int64 document boundaries as sequence numbers.
"""

import importlib
import struct
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from trainer.data.table import Ints
from trainer.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK = 1 << 20
_WHOLE_BYTES = 64 << 20
_BLOCKS, _BLOCK_BYTES = 1024, 64 << 10


class Sidecar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PREFIX.json`, written by `keepwarm data tokenize` beside the token file."""

    content: str
    """Content hash of the files that this describes."""
    tokenizer: str
    """`bytes`, or the file that the tokenizer was loaded from."""
    tokenizer_hash: str
    vocabulary_size: int
    end_of_document: int
    documents: int
    tokens: int
    max_id: int
    prefixed: int = 0
    """Documents of two sequences, of which the first is a prefix that carries no loss; the others have one."""


@dataclass(frozen=True, slots=True)
class Header:
    """The head of an `.idx` file; both files were found to have the sizes that follow from it."""

    dtype: npt.DTypeLike
    sequences: int
    boundaries: int


class TokenFile:
    """The documents of one `PREFIX.bin` and `PREFIX.idx`, as one stream of tokens.

    Nothing but memory maps is held, so memory does not grow with the data. The Megatron dataset is kept alive as long
    as this object, since views into it die with it.

    Args:
        prefix: path without `.bin`.
        vocabulary_size: ids at or above it are refused, at once where a sidecar knows the largest one and otherwise
            when they are read; None: not checked.

    Raises:
        DataError: a file is missing, empty, truncated, foreign or contradicts the other; names it.
    """

    def __init__(self, prefix: str | Path, vocabulary_size: int | None = None) -> None:
        self.path = str(prefix)
        self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._header = _checked_header(self._bin, self._idx)
        _check_index(self._bin, self._idx, self._header)
        self.content = content_hash(self._bin, self._idx)
        self.sidecar = _read_sidecar(Path(f"{prefix}.json"), self.content)
        self._vocabulary_size = vocabulary_size
        if self.sidecar is not None:
            self._check_ids(self.sidecar.max_id)
        self._itemsize = np.dtype(self._header.dtype).itemsize
        self.count = self._bin.stat().st_size // self._itemsize
        self._dataset = _open_dataset(self.path)

    @property
    def documents(self) -> int:
        return self._header.boundaries - 1

    def read(self, start: int, count: int) -> Ints:
        """Tokens `start` to `start + count` of all documents in a row, as int64."""
        if not 0 <= start <= start + count <= self.count:
            raise IndexError(f"tokens {start} to {start + count} of {self.count}")
        reader = self._dataset.bin_reader
        stored = reader.read(dtype=self._header.dtype, count=count, offset=start * self._itemsize)
        tokens: Ints = stored.astype(np.int64)
        if count and self._vocabulary_size is not None:
            self._check_ids(int(tokens.max()), int(tokens.min()))
        return tokens

    def document(self, index: int) -> Ints:
        """Tokens of one document."""
        start, end = (int(value) for value in self._starts(np.array([index, index + 1])))
        return self.read(start, end - start)

    def starts_between(self, start: int, end: int) -> Ints:
        """Tokens in `[start, end)` that begin a document, ascending; found by binary search."""
        first, last = self._bisect(start), self._bisect(end)
        return self._starts(np.arange(first, last))

    def prefixes_between(self, start: int, end: int) -> list[tuple[int, int]]:
        """Ranges of tokens in `[start, end)` that stand before a document and carry no loss, ascending."""
        if self.sidecar is None or not self.sidecar.prefixed:
            return []
        found = []
        index = self._dataset.index
        for document in range(max(0, self._bisect(start + 1) - 1), self._bisect(end)):
            first, after = (int(sequence) for sequence in index.document_indices[document : document + 2])
            if after - first == 2:
                low, high = (int(index.sequence_pointers[one]) // self._itemsize for one in (first, first + 1))
                found.append((max(low, start), min(high, end)))
        return [(low, high) for low, high in found if low < high]

    def _starts(self, documents: Ints) -> Ints:
        """First token of each document; the number of tokens for the one past the last."""
        index = self._dataset.index
        sequences = index.document_indices[documents]
        pointers = index.sequence_pointers[np.minimum(sequences, self._header.sequences - 1)] // self._itemsize
        return np.where(sequences < self._header.sequences, pointers, self.count)

    def _bisect(self, token: int) -> int:
        """Number of documents that begin before `token`.

        Done by hand: the arrays lie unaligned in the file, so that NumPy's own search would copy them whole.
        """
        low, high = 0, self.documents
        index, last = self._dataset.index, self._header.sequences
        while low < high:
            middle = (low + high) // 2
            sequence = int(index.document_indices[middle])
            begin = self.count if sequence >= last else int(index.sequence_pointers[sequence]) // self._itemsize
            if begin < token:
                low = middle + 1
            else:
                high = middle
        return low

    def _check_ids(self, highest: int, lowest: int = 0) -> None:
        size = self._vocabulary_size
        if size is not None and (highest >= size or lowest < 0):
            outside = lowest if lowest < 0 else highest
            raise DataError(
                f"{self._bin}: token id {outside} is outside model.vocabulary_size = {size}; "
                "the data were made with another tokenizer"
            )


def content_hash(bin_path: Path, idx_path: Path) -> str:
    """What identifies a token file wherever it lies: xxh3-128 over all of `.idx`, the size of `.bin`, and `.bin`.

    A `.bin` above 64 MiB enters with 1,024 evenly spaced blocks of 64 KiB, first and last included: hashing terabytes
    at each start is out of the question, and the `.idx` already tells the length of every document.
    """
    digest = xxhash.xxh3_128()
    with idx_path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    size = bin_path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with bin_path.open("rb") as stream:
        if size <= _WHOLE_BYTES:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        else:
            for block in range(_BLOCKS):
                stream.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


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
    if version != 1:
        raise DataError(f"{idx_path}: index version {version}, only version 1 is known")
    if code not in _DTYPES:
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
        raise DataError(f"{idx_path}: holds no document")
    return Header(_DTYPES[code], sequences, boundaries)


def _check_index(bin_path: Path, idx_path: Path, header: Header) -> None:
    """Read the index once, a piece at a time, and see that it describes exactly the `.bin` file."""
    itemsize, begin = np.dtype(header.dtype).itemsize, _HEADER.size
    lengths: npt.NDArray[Any] = np.memmap(idx_path, "<i4", "r", begin, header.sequences)
    begin += lengths.nbytes
    pointers: npt.NDArray[Any] = np.memmap(idx_path, "<i8", "r", begin, header.sequences)
    begin += pointers.nbytes
    boundaries: npt.NDArray[Any] = np.memmap(idx_path, "<i8", "r", begin, header.boundaries)
    total = 0
    for low in range(0, header.sequences, _CHUNK):
        part = lengths[low : low + _CHUNK].astype(np.int64)
        ends = total + np.cumsum(part)
        if part.min() < 0 or not np.array_equal(pointers[low : low + _CHUNK], (ends - part) * itemsize):
            raise DataError(f"{idx_path}: damaged: the sequences from number {low} on do not follow one another")
        total = int(ends[-1])
    size = bin_path.stat().st_size
    if size != total * itemsize:
        word = "truncated" if size < total * itemsize else "too long"
        raise DataError(f"{bin_path}: {word}: {size} bytes, {total * itemsize} follow from {idx_path.name}")
    last = 0
    for low in range(0, header.boundaries, _CHUNK):
        part = boundaries[low : low + _CHUNK].astype(np.int64)
        if (np.diff(part, prepend=last) < 0).any() or (low == 0 and part[0] != 0):
            raise DataError(f"{idx_path}: damaged: the document boundaries from number {low} on are out of order")
        last = int(part[-1])
    if last != header.sequences:
        raise DataError(f"{idx_path}: damaged: its documents end at sequence {last} of {header.sequences}")


def _read_sidecar(path: Path, content: str) -> Sidecar | None:
    """What the sidecar says; None without one, or with a file that is not ours."""
    if not path.is_file():
        return None
    try:
        sidecar = msgspec.json.decode(path.read_bytes(), type=Sidecar)
    except msgspec.MsgspecError:
        return None
    if sidecar.content != content:
        raise DataError(
            f"{path}: describes other data than the .bin and .idx beside it; one of them was replaced: "
            "tokenize again, or delete it if it is the stale one"
        )
    return sidecar


def _open_dataset(prefix: str) -> "IndexedDataset":
    return megatron_indexed().IndexedDataset(prefix, mmap=True)


def megatron_indexed() -> Any:
    """The module `megatron.core.datasets.indexed_dataset`, imported late, without its warnings and its family.

    `megatron.core` imports all of Megatron Core and with it torch's compiler, which takes longer than all else that a
    rank does before its first step. A bare package stands in for it while the one module is imported; whoever imports
    `megatron.core` afterwards gets the whole.
    """
    with warnings.catch_warnings():
        for message in (
            "Transformer Engine and Apex are not installed",
            "The following imports from `dynamic_context.py` will be removed",
            "`torch.jit.script_method` is deprecated",
        ):
            warnings.filterwarnings("ignore", message=message)
        bare = "megatron.core" not in sys.modules
        if bare:
            sys.modules["megatron.core"] = _bare_package("megatron", "core")
        try:
            importlib.import_module("megatron.core.parallel_state")  # first: its import of utils is circular
            return importlib.import_module("megatron.core.datasets.indexed_dataset")
        finally:
            if bare:
                del sys.modules["megatron.core"]


def _bare_package(parent: str, name: str) -> types.ModuleType:
    """A package whose modules can be imported without running its `__init__`."""
    package = types.ModuleType(f"{parent}.{name}")
    package.__path__ = [str(Path(folder) / name) for folder in importlib.import_module(parent).__path__]
    return package
