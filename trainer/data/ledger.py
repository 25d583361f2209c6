"""The ledger: which sample stands at every position, and what each source has given so far.

The sample at a position is a pure function of (seed, segments, position). It does not depend on the layout, the
micro-batch or how often the job was stopped. A ledger is a value: whatever changes it returns another one. A job that
continues another keeps its ledger, and with it the seed, so that "the k-th sample of this source" keeps its meaning
and a later stage can draw again from exactly what was seen. Torch-free.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from trainer.data.table import UNITS, Ints, Table, quantise, table
from trainer.errors import CheckpointError, DataError

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of a source's sample numbers k, ascending and disjoint."""


class Identified(Protocol):
    """What the ledger needs to know of a source."""

    @property
    def identity(self) -> str:
        """Content hash of the data and the sequence length; the same wherever the files lie."""
        ...

    @property
    def size(self) -> int:
        """Samples in one epoch."""
        ...


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A source that some segment draws from."""

    name: str
    """What the job calls it; for messages."""
    size: int
    """Samples in one epoch."""


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one source contributes to a segment."""

    source: str
    """Identity of the source."""
    units: int
    """Weight in units of 1/65,536."""
    offset: int
    """Sample number k of its first sample in this segment."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Positions from `start` on, up to the next segment, drawn with fixed weights."""

    start: int
    shares: tuple[Share, ...]
    seen: dict[str, Ranges]
    """By identity, what each source had given before `start`."""

    @property
    def table(self) -> Table:
        return table(tuple(share.units for share in self.shares))

    def seen_before(self, position: int) -> dict[str, Ranges]:
        """By identity, what each source has given at all positions below `position`, which lies in this segment."""
        seen = dict(self.seen)
        counts = self.table.counts_before(position - self.start)
        for share, count in zip(self.shares, counts, strict=True):
            if count:
                new = (share.offset, share.offset + count)
                seen[share.source] = _merged(*seen.get(share.source, ()), new)
        return seen


class Given(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a source has given."""

    consumed: int
    """Samples, repeats included."""
    ranges: Ranges
    """Their sample numbers k; `k // size` is the epoch."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Samples at some positions: sample i is number `k[i]` of the source `identities[source[i]]`."""

    identities: tuple[str, ...]
    source: Ints
    k: Ints


class Ledger(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the module. `position` is the number of samples consumed: everything below it has been handed out."""

    seed: int
    position: int = 0
    sources: dict[str, Origin] = {}
    segments: tuple[Segment, ...] = ()

    def opened(
        self,
        mixture: Mapping[str, float],
        sources: Mapping[str, Identified],
        *,
        start: int | None = None,
        offsets: Mapping[str, int] | None = None,
    ) -> "Ledger":
        """A ledger whose mixture changes at `start`, which is not below `position` (default: there).

        Each source goes on where it stopped, or at the sample number that `offsets` names for it, which is how data
        are skipped. Segments planned from `start` on are dropped. When the mixture is what holds at `start` already,
        the ledger returned draws as before.

        Args:
            mixture: weight of each source by name; normalised.
            sources: the sources by name; more than the mixture names is fine.

        Raises:
            SpecError: a weight is not positive, or below 1/65,536 of the whole.
            DataError: a source is missing, or two of them are the same data.
        """
        start = self.position if start is None else start
        if start < self.position:
            raise ValueError(f"a segment cannot start at {start}: {self.position} samples are already consumed")
        units = quantise(mixture)
        named: dict[str, str] = {}
        for name in units:
            if name not in sources:
                raise DataError(f"the mixture names the source {name!r}, which is not in data.sources")
            identity = sources[name].identity
            if identity in named:
                raise DataError(f"data.sources.{named[identity]} and data.sources.{name} are the same data")
            named[identity] = name
        kept = tuple(segment for segment in self.segments if segment.start < start)
        seen = kept[-1].seen_before(start) if kept else {}
        shares = tuple(
            Share(
                source=identity,
                units=units[name],
                offset=(offsets or {}).get(name, seen[identity][-1][1] if identity in seen else 0),
            )
            for identity, name in named.items()
        )
        until = tuple(segment for segment in self.segments if segment.start <= start)
        if until and not offsets and _weights(until[-1].shares) == _weights(shares):
            return msgspec.structs.replace(self, segments=until)
        segment = Segment(start=start, shares=shares, seen=seen)
        origins = {identity: Origin(name=name, size=sources[name].size) for identity, name in named.items()}
        return msgspec.structs.replace(self, sources=self.sources | origins, segments=(*kept, segment))

    def upcoming(self) -> tuple[Segment, ...]:
        """The segments that samples from `position` on are drawn from."""
        past = bisect_right(self.segments, self.position, key=lambda segment: segment.start) - 1
        return self.segments[max(past, 0) :]

    def advanced(self, samples: int) -> "Ledger":
        """The ledger after `samples` more were handed out."""
        return msgspec.structs.replace(self, position=self.position + samples)

    def samples_at(self, positions: Ints) -> Draw:
        """Source and sample number of each position; any order, no scan."""
        segments = self._segments_at(positions)
        identities = tuple(self.sources)
        source, k = np.empty_like(positions), np.empty_like(positions)
        for index in np.unique(segments):
            segment, chosen = self.segments[index], segments == index
            turn, count = segment.table.samples_at(positions[chosen] - segment.start)
            source[chosen] = np.array([identities.index(share.source) for share in segment.shares])[turn]
            k[chosen] = np.array([share.offset for share in segment.shares])[turn] + count
        return Draw(identities, source, k)

    def sample_at(self, position: int) -> tuple[str, int]:
        """Identity of the source at `position`, and its sample number k."""
        draw = self.samples_at(np.array([position], np.int64))
        return draw.identities[int(draw.source[0])], int(draw.k[0])

    def given(self, position: int | None = None) -> dict[str, Given]:
        """By identity, what each source has given below `position` (default: the ledger's own)."""
        position = self.position if position is None else position
        index = bisect_right(self.segments, position, key=lambda segment: segment.start) - 1
        seen = self.segments[index].seen_before(position) if index >= 0 else {}
        return {
            source: Given(consumed=sum(end - start for start, end in ranges), ranges=ranges)
            for source, ranges in seen.items()
        }

    def epochs(self, position: int | None = None) -> dict[str, float]:
        """By identity, how often each source's samples have been gone through; above 1 they repeat."""
        return {source: given.consumed / self.sources[source].size for source, given in self.given(position).items()}

    def save(self) -> dict[str, Any]:
        """Plain values for JSON, with what each source has given beside what it follows from."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain | {"given": msgspec.to_builtins(self.given())}

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> "Ledger":
        """The inverse of `save`.

        Raises:
            CheckpointError: the values are not a ledger, or contradict each other.
        """
        plain = dict(saved)
        given = plain.pop("given", None)
        try:
            ledger = msgspec.convert(plain, cls)
            ledger._check()
            agrees = given is None or msgspec.convert(given, dict[str, Given]) == ledger.given()
        except (msgspec.ValidationError, ValueError) as error:
            raise CheckpointError(f"the data ledger is damaged: {error}") from None
        if not agrees:
            raise CheckpointError("the data ledger is damaged: what its sources have given does not follow from it")
        return ledger

    def _segments_at(self, positions: Ints) -> Ints:
        starts = np.array([segment.start for segment in self.segments], np.int64)
        segments = np.searchsorted(starts, positions, side="right") - 1
        if positions.size and segments.min() < 0:
            raise ValueError("the ledger has no segment at this position: open one first")
        return segments

    def _check(self) -> None:
        starts = [segment.start for segment in self.segments]
        if starts != sorted(set(starts)) or min([*starts, 0]) < 0:
            raise ValueError(f"segments start at {starts}")
        if self.position < min([*starts, self.position]) or self.position < 0:
            raise ValueError(f"position {self.position} lies before the first segment")
        if any(origin.size < 1 for origin in self.sources.values()):
            raise ValueError("a source without samples")
        for segment in self.segments:
            sources = [share.source for share in segment.shares]
            if len(set(sources)) != len(sources) or not {*sources, *segment.seen} <= set(self.sources):
                raise ValueError(f"the segment at {segment.start} draws from unknown or repeated sources")
            if any(share.units < 1 or share.offset < 0 for share in segment.shares):
                raise ValueError(f"the segment at {segment.start} has a weight or offset below its range")
            if sum(share.units for share in segment.shares) != UNITS:
                raise ValueError(f"the weights of the segment at {segment.start} do not add up to {UNITS}")


def _weights(shares: tuple[Share, ...]) -> dict[str, int]:
    return {share.source: share.units for share in shares}


def _merged(*ranges: tuple[int, int]) -> Ranges:
    """The same numbers as ascending, disjoint ranges."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
