"""Packed samples: windows of fixed length over the concatenated documents of a source.

Window w covers tokens w*S to w*S + S of the source: S inputs, and the same shifted by one as targets. The incomplete
window at the end is dropped and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.data.permutation import window_at
from keepwarm.trainer.data.replay import Identified, Pieces
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Packed samples, each array of shape `[samples, sequence]`."""

    tokens: Ints
    targets: Ints
    """The next token; IGNORED within a prefix and, with a document mask, across a document boundary."""
    documents: npt.NDArray[np.int32] | None
    """Document number of each token, from 0 in each sample; None without a document mask."""


class Tokens(Protocol):
    """A stream of documents; `keepwarm.trainer.data.indexed.TokenFile` reads one from disk."""

    @property
    def path(self) -> str:
        """For messages."""
        ...

    @property
    def content(self) -> str:
        """Content hash."""
        ...

    @property
    def count(self) -> int:
        """Number of tokens in all documents."""
        ...

    def read(self, start: int, count: int) -> Ints:
        """Return tokens `start` to `start + count` of all documents concatenated, as int64."""
        ...

    def starts_between(self, start: int, end: int) -> Ints:
        """Return the tokens in `[start, end)` that begin a document, ascending."""
        ...

    def prefixes_between(self, start: int, end: int) -> Sequence[tuple[int, int]]:
        """Return the token ranges in `[start, end)` that are prefixes without loss, ascending."""
        ...


class Source(Identified, Protocol):
    """A source that a mixture can draw from. Samples are numbered by k; numbers from `size` on repeat."""

    @property
    def name(self) -> str:
        """The job's name for the source."""
        ...

    @property
    def sequence_length(self) -> int:
        """Tokens per sample."""
        ...

    def read(self, k: Ints, *, seed: int) -> Samples:
        """Return the samples with these numbers, in the order that `seed` fixes.

        Raises:
            DataError: the data are not as expected; names the file.
        """
        ...

    def at_length(self, sequence_length: int) -> "Source":
        """Return the same data in samples of `sequence_length` tokens."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PackedSource:
    """A source whose samples are packed windows, in an order that is permuted afresh each epoch."""

    name: str
    tokens: Tokens
    sequence_length: int
    document_mask: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError(
                f"{self.tokens.path}: {self.tokens.count} tokens are too few for one sample of "
                f"sequence_length = {self.sequence_length}, which takes one more"
            )

    @property
    def identity(self) -> str:
        return f"{self.tokens.content}/{self.sequence_length}"

    @property
    def size(self) -> int:
        return max(0, self.tokens.count - 1) // self.sequence_length

    @property
    def dropped(self) -> int:
        """Number of tokens in the incomplete last window, which are never targets."""
        return self.tokens.count - 1 - self.size * self.sequence_length

    def read(self, k: Ints, *, seed: int) -> Samples:
        return self.windows(window_at(k, seed=seed, identity=self.identity, size=self.size))

    def at_length(self, sequence_length: int) -> "PackedSource":
        return self if sequence_length == self.sequence_length else replace(self, sequence_length=sequence_length)

    def windows(self, indices: Ints) -> Samples:
        """Return windows by their index in the source."""
        length = self.sequence_length
        rows = np.empty((len(indices), length + 1), np.int64)
        for row, window in zip(rows, indices.tolist(), strict=True):
            row[:] = self.tokens.read(window * length, length + 1)
        tokens, targets = rows[:, :-1], rows[:, 1:].copy()
        for target, window in zip(targets, indices.tolist(), strict=True):
            first = window * length + 1
            for low, high in self.tokens.prefixes_between(first, first + length):
                target[low - first : high - first] = IGNORED
        if not self.document_mask:
            return Samples(np.ascontiguousarray(tokens), targets, None)
        begins = np.zeros((len(indices), length + 1), np.bool_)
        for flags, window in zip(begins, indices.tolist(), strict=True):
            first = window * length + 1
            flags[self.tokens.starts_between(first, first + length) - (first - 1)] = True
        targets[begins[:, 1:]] = IGNORED
        documents = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)
        return Samples(np.ascontiguousarray(tokens), targets, documents)


def assembled(pieces: Pieces, parts: Sequence[tuple[Ints, Samples]]) -> Samples:
    """Assemble rows from pieces of samples, in the order of their places.

    Each part holds the samples of some pieces, by index. With a document mask, no document continues from one piece
    into the next.
    """
    rows, row = np.unique(pieces.place, return_inverse=True)
    length = int((pieces.column + pieces.stop - pieces.start).max())
    tokens, targets = np.empty((len(rows), length), np.int64), np.empty((len(rows), length), np.int64)
    masked = parts[0][1].documents is not None
    documents = np.empty((len(rows), length), np.int32)
    where = {int(piece): (samples, place) for own, samples in parts for place, piece in enumerate(own)}
    following = [0] * len(rows)
    for piece in np.lexsort((pieces.column, row)):
        samples, place = where[int(piece)]
        inside = slice(pieces.start[piece], pieces.stop[piece])
        own, column = row[piece], pieces.column[piece]
        across = slice(column, column + inside.stop - inside.start)
        tokens[own, across] = samples.tokens[place, inside]
        targets[own, across] = samples.targets[place, inside]
        if samples.documents is not None:
            numbers = samples.documents[place, inside]
            documents[own, across] = numbers - numbers[0] + following[own]
            following[own] = int(documents[own, across.stop - 1]) + 1
    return Samples(tokens, targets, documents if masked else None)
