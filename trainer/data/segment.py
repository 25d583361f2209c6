"""Segments: parts of the run that are drawn with fixed weights. Values, saved as they are. Torch-free."""

from collections.abc import Sequence

import msgspec

from keepwarm.trainer.data.replay import Run, length_of
from keepwarm.trainer.data.table import Table, table

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of a source's sample numbers k, ascending and disjoint."""


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contribution of one source to a segment."""

    source: str
    """Identity of the source."""
    units: int
    """Weight in units of 1/65,536."""
    offset: int
    """Sample number k of its first sample in this segment."""


class ReplayShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contribution of one replay clause to a segment."""

    replay: int
    """Index among the ledger's replays."""
    units: int
    """Weight in units of 1/65,536."""
    offset: int
    """Number of its first draw in this segment."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Positions from `start` up to the next segment, drawn with fixed weights."""

    start: int
    shares: tuple[Share, ...]
    seen: dict[str, Ranges]
    """By identity, what each source had given before `start`."""
    replays: tuple[ReplayShare, ...] = ()

    @property
    def table(self) -> Table:
        """The order in which the shares take turns."""
        return table(tuple(share.units for share in self.all_shares))

    @property
    def sequence_length(self) -> int:
        """Tokens in each of its samples."""
        return length_of(self.shares[0].source)

    @property
    def all_shares(self) -> tuple[Share | ReplayShare, ...]:
        """Return the shares in the order of the table."""
        return (*self.shares, *self.replays)

    def runs_between(self, start: int, end: int) -> tuple[Run, ...]:
        """Return what the sources give at positions from `start` to `end`, both in this segment or at its end."""
        low, high = (self.table.counts_before(at - self.start) for at in (start, end))
        return tuple(
            (share.source, share.offset + first, share.offset + last)
            for share, first, last in zip(self.shares, low, high, strict=False)
            if first < last
        )

    def seen_before(self, position: int) -> dict[str, Ranges]:
        """Return, by identity, what each source has given at all positions below `position`, which is in this
        segment."""
        seen = dict(self.seen)
        counts = self.table.counts_before(position - self.start)
        for share, count in zip(self.shares, counts, strict=False):
            if count:
                new = (share.offset, share.offset + count)
                seen[share.source] = merged(*seen.get(share.source, ()), new)
        return seen


def drawn(segments: Sequence[Segment], start: int, end: int) -> tuple[Run, ...]:
    """Return what the sources gave at positions from `start` to `end`; contiguous runs are joined."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    ends = [*(segment.start for segment in segments[1:]), end]
    for segment, stop in zip(segments, ends, strict=False):
        low, high = max(start, segment.start), min(end, stop)
        if low < high:
            for source, first, last in segment.runs_between(low, high):
                ranges.setdefault(source, []).append((first, last))
    return tuple((source, first, last) for source, own in ranges.items() for first, last in merged(*own))


def draws_before(segments: Sequence[Segment], replay: int, position: int) -> int:
    """Return the number of draws that a replay clause has made before `position`."""
    end = position
    for segment in reversed(segments):
        for place, share in enumerate(segment.replays, start=len(segment.shares)):
            if share.replay == replay:
                return share.offset + segment.table.counts_before(end - segment.start)[place]
        end = segment.start
    return 0


def weights_of(segment: Segment) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Return the units by source and by replay clause; equal for segments that draw alike."""
    return {share.source: share.units for share in segment.shares}, [
        (share.replay, share.units) for share in segment.replays
    ]


def merged(*ranges: tuple[int, int]) -> Ranges:
    """Return the same numbers as ascending, disjoint ranges."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
