"""Token files as a single stream of documents, identified by content and checked against their sidecar."""

from pathlib import Path

import msgspec
import numpy as np
import xxhash

from keepwarm.foreign_json import parse_json
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.data.token_format import TokenFileReader
from keepwarm.trainer.errors import DataError

_CHUNK = 1 << 20
_WHOLE_BYTES = 64 << 20
_SIDECAR_LIMIT = 1 << 20
_BLOCKS, _BLOCK_BYTES = 1024, 64 << 10


class Sidecar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PREFIX.json`, written by `keepwarm data tokenize` beside the token file."""

    content: str
    """Content hash of the files that it describes."""
    tokenizer: str
    """`bytes`, or the file that the tokenizer was loaded from."""
    tokenizer_hash: str
    vocabulary_size: int
    end_of_document: int
    documents: int
    tokens: int
    max_id: int
    prefixed: int = 0
    """Documents with two sequences, the first of which is a prefix without loss; all others have one."""
    skipped: int = 0
    """Lines of the input that were left out since they are no document."""


class TokenFile:
    """The documents of one `PREFIX.bin` and `PREFIX.idx`, as a single stream of tokens.

    Holds nothing but memory maps, so memory does not grow with the data.

    Args:
        prefix: path without `.bin`.
        vocabulary_size: refuse ids at or above it, at once if a sidecar records the largest id and otherwise when
            they are read; None: no check.

    Raises:
        DataError: a file is missing, empty, truncated, foreign or contradicts the other; names it.
    """

    def __init__(self, prefix: str | Path, vocabulary_size: int | None = None) -> None:
        self.path = str(prefix)
        self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._file = TokenFileReader(self._bin, self._idx)
        self.content = content_hash(self._bin, self._idx)
        self.sidecar = _read_sidecar(Path(f"{prefix}.json"), self.content)
        self._vocabulary_size = vocabulary_size
        if self.sidecar is not None:
            self._check_ids(self.sidecar.max_id)
        self.count = self._file.count

    @property
    def documents(self) -> int:
        return self._file.documents

    def read(self, start: int, count: int) -> Ints:
        """Return tokens `start` to `start + count` of all documents concatenated, as int64."""
        if not 0 <= start <= start + count <= self.count:
            raise IndexError(f"tokens {start} to {start + count} of {self.count}")
        tokens: Ints = self._file.tokens(start, count).astype(np.int64)
        if count and self._vocabulary_size is not None:
            self._check_ids(int(tokens.max()), int(tokens.min()))
        return tokens

    def document(self, index: int) -> Ints:
        """Return the tokens of one document."""
        start, end = (int(value) for value in self._starts(np.array([index, index + 1])))
        return self.read(start, end - start)

    def starts_between(self, start: int, end: int) -> Ints:
        """Return the tokens in `[start, end)` that begin a document, ascending; found by binary search."""
        first, last = self._bisect(start), self._bisect(end)
        return self._starts(np.arange(first, last))

    def prefixes_between(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the token ranges in `[start, end)` that are prefixes without loss, ascending."""
        if self.sidecar is None or not self.sidecar.prefixed:
            return []
        prefixes = []
        for document in range(max(0, self._bisect(start + 1) - 1), self._bisect(end)):
            first, after = (int(sequence) for sequence in self._file.boundaries[document : document + 2])
            if after - first == 2:
                low, high = (self._file.first_token(one) for one in (first, first + 1))
                prefixes.append((max(low, start), min(high, end)))
        return [(low, high) for low, high in prefixes if low < high]

    def _starts(self, documents: Ints) -> Ints:
        """Return the first token of each document; for the one past the last, the number of tokens."""
        header = self._file.header
        sequences = self._file.boundaries[documents]
        begins = self._file.offsets[np.minimum(sequences, header.sequences - 1)] // header.dtype.itemsize
        return np.where(sequences < header.sequences, begins, self.count)

    def _bisect(self, token: int) -> int:
        """Return the number of documents that begin before `token`.

        Does its own search: the arrays are unaligned in the file, so NumPy's search would copy them whole.
        """
        low, high = 0, self.documents
        while low < high:
            middle = (low + high) // 2
            if self._file.first_token(int(self._file.boundaries[middle])) < token:
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
                "the data were tokenized with a different tokenizer"
            )


def content_hash(bin_path: Path, idx_path: Path) -> str:
    """Hash the content of a token file, wherever it lies: xxh3-128 over all of `.idx`, the size of `.bin`, and `.bin`.

    Of a `.bin` above 64 MiB, only 1,024 evenly spaced blocks of 64 KiB are hashed, including the first and last:
    hashing terabytes at each start is out of the question, and the `.idx` already fixes the length of every document.
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


def _read_sidecar(path: Path, content: str) -> Sidecar | None:
    """Read a sidecar; None if there is none, or if the file is not ours."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _SIDECAR_LIMIT:
            return None
        sidecar = msgspec.convert(parse_json(path.read_bytes()), Sidecar)
    except ValueError:  # Those of msgspec too.
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if sidecar.content != content:
        raise DataError(
            f"{path}: does not match the .bin and .idx next to it; one of them was replaced: "
            "tokenize again, or delete this file if it is the stale one"
        )
    return sidecar
