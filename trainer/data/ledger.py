"""The data ledger: the sample at every position, and what each source has given so far.

The sample at a position is a pure function of (seed, segments, position). It does not depend on the layout, the
micro-batch or how often the job was stopped. A ledger is a value: operations return a new one. A job that continues
another keeps its ledger, and with it the seed, so that "the k-th sample of this source" keeps its meaning and a later
stage can draw exactly the seen samples again. Torch-free.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from keepwarm.trainer.data.replay import (
    Identified,
    Pieces,
    Pool,
    Replay,
    Run,
    content_of,
    length_of,
    lengths_of,
    pools_of,
    stand_in_pool,
)
from keepwarm.trainer.data.segment import Ranges, ReplayShare, Segment, Share, drawn, draws_before, merged, weights_of
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.data.weights import UNITS, quantise
from keepwarm.trainer.errors import CheckpointError, DataError, SpecError


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A source that at least one segment draws from."""

    name: str
    """The job's name for it; for messages."""
    size: int
    """Samples in one epoch."""


class StageMark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The start of a stage, at position `start`."""

    name: str
    start: int


class PastStage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stage of a run that this one continues."""

    run: str
    name: str
    samples: int
    """Including replayed ones."""
    runs: tuple[Run, ...]
    """Samples that it saw, excluding replay."""


class Given(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a source has given so far."""

    consumed: int
    """Number of samples, including repeats."""
    ranges: Ranges
    """Their sample numbers k; `k // size` is the epoch."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Samples at given positions: sample i is number `k[i]` of the source `identities[source[i]]`."""

    identities: tuple[str, ...]
    source: Ints
    k: Ints
    replayed: npt.NDArray[np.bool_]
    cuts: tuple[Pieces, ...] = ()
    """Pieces of positions that replay samples of a different length; their `source` and `k` are those of the first
    piece. `place` is of the position, `source` of the identity."""


class Ledger(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the module docstring. `position` is the number of samples consumed: all positions below it were
    handed out."""

    seed: int
    position: int = 0
    sources: dict[str, Origin] = {}
    segments: tuple[Segment, ...] = ()
    replays: tuple[Replay, ...] = ()
    stages: tuple[StageMark, ...] = ()
    """Stages of this run that have begun or are planned."""
    past: tuple[PastStage, ...] = ()
    """Stages of the runs that this one continues, oldest first."""

    def opened(
        self,
        mixture: Mapping[str, float],
        sources: Mapping[str, Identified],
        *,
        start: int | None = None,
        replay: Sequence[ReplaySpec] = (),
        stage: str | None = None,
        skip: int = 0,
    ) -> "Ledger":
        """Return a ledger whose mixture changes at `start`, which is at least `position` (the default).

        Each source continues where it stopped. Segments planned from `start` on are dropped. If the mixture already
        holds at `start`, the returned ledger draws as before.

        Args:
            mixture: weight of each source by name; normalised.
            sources: the sources by name; may include sources outside the mixture.
            replay: clauses of the stage; each takes its fraction of the samples, the mixture gets the rest.
            stage: the stage that `start` belongs to; it begins there unless it has already begun.
            skip: samples to skip in every source of the mixture when the stage begins.

        Raises:
            SpecError: a weight is not positive, or below 1/65,536 of the total; or a replay clause names neither an
                earlier stage nor a source.
            DataError: a source is missing, two of them are the same data, or there is nothing to replay.
        """
        start = self.position if start is None else start
        if start < self.position:
            raise ValueError(f"a segment cannot start at {start}: {self.position} samples are already consumed")
        replay_units = [_replay_units(clause) for clause in replay]
        units = _units_by_identity(quantise(mixture, _remaining_units(replay_units)), sources)
        kept = tuple(segment for segment in self.segments if segment.start < start)
        ledger = self._begun(stage, start)
        if replay and not ledger.stages:
            raise ValueError("replay belongs to a stage: name it")
        clauses = [ledger._resolved(clause, sources, kept, length_of(next(iter(units)))) for clause in replay]
        ledger = msgspec.structs.replace(ledger, replays=tuple(dict.fromkeys((*ledger.replays, *clauses))))
        if not ledger.stages or ledger.stages[-1].start != start:
            skip = 0  # the stage has already begun
        seen = kept[-1].seen_before(start) if kept else self._seen_in_past()
        again = zip((ledger.replays.index(clause) for clause in clauses), replay_units, strict=True)
        segment = Segment(start=start, shares=_shares(units, seen, skip), seen=seen, replays=_again(again, kept, start))
        until = tuple(one for one in self.segments if one.start <= start)
        if until and _draw_alike(until[-1], segment, skip):
            return msgspec.structs.replace(ledger, segments=until)
        used = [*units, *(identity for clause in clauses for identity in clause.identities)]
        return msgspec.structs.replace(
            ledger, sources=self.sources | _origins(used, sources), segments=(*kept, segment)
        )

    def continued(self, run: str) -> "Ledger":
        """Return the ledger of a run that starts from this one: position 0, the same seed, and its stages as the past.

        Sources continue where they stopped.
        """
        marks = [mark for mark in self.stages if mark.start < self.position]
        if not marks and self.position:
            marks = [StageMark(name=run, start=0)]
        ends = [*(mark.start for mark in marks[1:]), self.position]
        new = (
            PastStage(run=run, name=mark.name, samples=end - mark.start, runs=drawn(self.segments, mark.start, end))
            for mark, end in zip(marks, ends, strict=False)
        )
        return Ledger(seed=self.seed, sources=self.sources, past=(*self.past, *new))

    def replayed(self, position: int | None = None) -> dict[str, int]:
        """Return, by replaying stage, how many of its samples below `position` (default: the ledger's own) were
        replayed.
        """
        position = self.position if position is None else position
        counts: dict[str, int] = {}
        ends = [*(segment.start for segment in self.segments[1:]), position]
        for segment, end in zip(self.segments, ends, strict=False):
            given = segment.table.counts_before(max(0, min(end, position) - segment.start))
            for share, count in zip(segment.replays, given[len(segment.shares) :], strict=True):
                name = self.replays[share.replay].stage
                counts[name] = counts.get(name, 0) + count
        return counts

    def _begun(self, stage: str | None, start: int) -> "Ledger":
        """Add a mark for the stage, unless it is in progress at `start`; drop later marks, which were only planned."""
        kept = tuple(mark for mark in self.stages if mark.start < start)
        if stage is not None and not (kept and kept[-1].name == stage):
            kept = (*kept, StageMark(name=stage, start=start))
        return msgspec.structs.replace(self, stages=kept)

    def _resolved(
        self, clause: ReplaySpec, sources: Mapping[str, Identified], kept: tuple[Segment, ...], row: int
    ) -> Replay:
        """Resolve which samples a clause may draw, for the stage begun last, whose samples have `row` tokens."""
        stage, begin = self.stages[-1].name, self.stages[-1].start
        ordinal = len(self.past) + len(self.stages) - 1
        where = f"stages.{stage}.replay"
        if clause.proxy_source is not None:
            pools: tuple[Pool, ...] = (stand_in_pool(clause.proxy_source, sources, where),)
        else:
            past = [(old.name, old.runs) for old in self.past]
            ends = [mark.start for mark in self.stages[1:]]
            past += [
                (mark.name, drawn(kept, mark.start, end)) for mark, end in zip(self.stages[:-1], ends, strict=True)
            ]
            pools = pools_of(clause.origins, past, self._names(sources), where)
        if not pools:
            origins = f"from {', '.join(clause.origins)}" if clause.origins else "from everything seen"
            raise DataError(f"{where}: {origins}: nothing was seen there before sample {begin} of the run")
        lengths = sorted(lengths_of(pools))
        if len(lengths) > 1:
            raise DataError(
                f"{where}: samples of {' and '.join(map(str, lengths))} tokens were seen there; "
                "write one clause for the stages of each sequence_length"
            )
        replay = Replay(
            stage=stage,
            law=clause.distribution,
            exponent=clause.exponent or 0.0,
            key=f"{clause.seed}/{ordinal}",
            pools=pools,
            known=clause.proxy_source is None,
            cut=None if lengths == [row] else (lengths[0], row),
        )
        self._check_there(replay, sources, where)
        return replay

    def _names(self, sources: Mapping[str, Identified]) -> dict[str, set[str]]:
        """Return identities by the names that this job and earlier ones use."""
        names: dict[str, set[str]] = {}
        for name, source in sources.items():
            names.setdefault(name, set()).add(source.identity)
        for identity, origin in self.sources.items():
            names.setdefault(origin.name, set()).add(identity)
        return names

    def _check_there(self, replay: Replay, sources: Mapping[str, Identified], where: str) -> None:
        there = {content_of(source.identity) for source in sources.values()}
        for identity in replay.identities:
            if content_of(identity) not in there:
                raise DataError(
                    f"{where}: replayed samples come from source {self.sources[identity].name!r} with content "
                    f"{content_of(identity)}, which is not in data.sources; add its file there"
                )

    def _seen_in_past(self) -> dict[str, Ranges]:
        seen: dict[str, Ranges] = {}
        for source, start, end in (run for stage in self.past for run in stage.runs):
            seen[source] = merged(*seen.get(source, ()), (start, end))
        return seen

    def upcoming(self) -> tuple[Segment, ...]:
        """Return the segments that samples from `position` on are drawn from."""
        past = bisect_right(self.segments, self.position, key=lambda segment: segment.start) - 1
        return self.segments[max(past, 0) :]

    def advanced(self, samples: int) -> "Ledger":
        """Return the ledger after handing out `samples` more."""
        return msgspec.structs.replace(self, position=self.position + samples)

    def samples_at(self, positions: Ints) -> Draw:
        """Return source and sample number of each position; in any order, without a scan."""
        segments = self._segments_at(positions)
        place = {identity: index for index, identity in enumerate(self.sources)}
        source, k = np.empty_like(positions), np.empty_like(positions)
        replayed = np.zeros(positions.shape, np.bool_)
        cuts = []
        for index in np.unique(segments):
            segment, chosen = self.segments[index], np.flatnonzero(segments == index)
            turn, count = segment.table.samples_at(positions[chosen] - segment.start)
            fresh = turn < len(segment.shares)
            own = chosen[fresh]
            source[own] = np.array([place[share.source] for share in segment.shares])[turn[fresh]]
            k[own] = np.array([share.offset for share in segment.shares])[turn[fresh]] + count[fresh]
            replayed[chosen] = ~fresh
            for number, share in enumerate(segment.replays, len(segment.shares)):
                replay, own = self.replays[share.replay], chosen[turn == number]
                numbers = share.offset + count[turn == number]
                identities = np.array([place[identity] for identity in replay.identities])
                if replay.cut is None:
                    origin, k[own] = replay.draw(numbers)
                    source[own] = identities[origin]
                elif own.size:
                    cut = replay.pieces(numbers)
                    cut = replace(cut, place=own[cut.place], source=identities[cut.source])
                    first = cut.column == 0
                    source[cut.place[first]], k[cut.place[first]] = cut.source[first], cut.k[first]
                    cuts.append(cut)
        return Draw(tuple(self.sources), source, k, replayed, tuple(cuts))

    def given(self, position: int | None = None) -> dict[str, Given]:
        """Return, by identity, what each source has given below `position` (default: the ledger's own)."""
        position = self.position if position is None else position
        index = bisect_right(self.segments, position, key=lambda segment: segment.start) - 1
        seen = self.segments[index].seen_before(position) if index >= 0 else self._seen_in_past()
        return {
            source: Given(consumed=sum(end - start for start, end in ranges), ranges=ranges)
            for source, ranges in seen.items()
        }

    def labels(self) -> dict[str, str]:
        """Return, by identity, the job's name of each source; content and length are added where a name has several."""
        names = Counter(origin.name for origin in self.sources.values())
        return {
            identity: origin.name
            if names[origin.name] == 1
            else f"{origin.name} (content {content_of(identity)}, {length_of(identity)} tokens)"
            for identity, origin in self.sources.items()
        }

    def tokens_between(self, start: int, end: int) -> int:
        """Return the number of tokens in the samples at positions `start` to `end`, including replayed ones."""
        ends = [*(segment.start for segment in self.segments[1:]), end]
        return sum(
            max(0, min(end, stop) - max(start, segment.start)) * segment.sequence_length
            for segment, stop in zip(self.segments, ends, strict=False)
        )

    def epochs(self, position: int | None = None) -> dict[str, float]:
        """Return, by identity, the number of passes over each source's samples; above 1 they repeat."""
        return {source: given.consumed / self.sources[source].size for source, given in self.given(position).items()}

    def save(self) -> dict[str, Any]:
        """Return plain values for JSON, including derived counts of given and replayed samples."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain | {"given": msgspec.to_builtins(self.given()), "replayed": self.replayed()}

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> "Ledger":
        """Restore what `save` returned.

        Raises:
            CheckpointError: the values are not a ledger, or contradict each other.
        """
        plain = dict(saved)
        given = plain.pop("given", None)
        plain.pop("replayed", None)
        try:
            ledger = msgspec.convert(plain, cls)
            ledger._check()
            agrees = given is None or msgspec.convert(given, dict[str, Given]) == ledger.given()
        except (msgspec.ValidationError, ValueError) as error:
            raise CheckpointError(f"the data ledger is damaged: {error}") from None
        if not agrees:
            raise CheckpointError("the data ledger is damaged: the counts of its sources do not match its segments")
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
            if any(share.units < 1 or share.offset < 0 for share in segment.all_shares):
                raise ValueError(f"the segment at {segment.start} has a weight or offset below its range")
            if sum(share.units for share in segment.all_shares) != UNITS:
                raise ValueError(f"the weights of the segment at {segment.start} do not add up to {UNITS}")
            if any(not 0 <= share.replay < len(self.replays) for share in segment.replays):
                raise ValueError(f"the segment at {segment.start} refers to an unknown replay clause")
        self._check_replays()

    def _check_replays(self) -> None:
        runs = [run for stage in self.past for run in stage.runs]
        for replay in self.replays:
            if not replay.pools or any(not pool.size or pool.age < 0 for pool in replay.pools):
                raise ValueError(f"stage {replay.stage} replays from nothing")
            runs += [run for pool in replay.pools for run in pool.runs]
        for source, start, end in runs:
            if source not in self.sources or not 0 <= start < end:
                raise ValueError(f"samples {start} to {end} of {source} cannot have been seen")


def _replay_units(clause: ReplaySpec) -> int:
    units = round(clause.fraction * UNITS)
    if units < 1:
        raise SpecError(f"replay.fraction = {clause.fraction} is below the smallest share of 1/{UNITS:,}")
    return units


def _remaining_units(replay_units: Sequence[int]) -> int:
    rest = UNITS - sum(replay_units)
    if rest < 1:
        raise SpecError(f"replay: the fractions add up to {sum(replay_units) / UNITS:g}; nothing is left for new data")
    return rest


def _units_by_identity(units: Mapping[str, int], sources: Mapping[str, Identified]) -> dict[str, int]:
    """Return the units of each source by identity instead of name; raises DataError as `Ledger.opened` does."""
    named: dict[str, str] = {}
    for name in units:
        if name not in sources:
            raise DataError(f"the mixture names the source {name!r}, which is not in data.sources")
        identity = sources[name].identity
        if identity in named:
            raise DataError(f"data.sources.{named[identity]} and data.sources.{name} are the same data")
        named[identity] = name
    return {identity: units[name] for identity, name in named.items()}


def _shares(units: Mapping[str, int], seen: Mapping[str, Ranges], skip: int) -> tuple[Share, ...]:
    """Return the share of each source, starting after its last seen sample plus `skip`."""
    ends = {identity: ranges[-1][1] for identity, ranges in seen.items()}
    return tuple(
        Share(source=identity, units=own, offset=ends.get(identity, 0) + skip) for identity, own in units.items()
    )


def _again(replays: Iterable[tuple[int, int]], kept: Sequence[Segment], start: int) -> tuple[ReplayShare, ...]:
    """Return the replay clauses, given by index and units, each starting where its draws below `start` ended."""
    return tuple(
        ReplayShare(replay=place, units=own, offset=draws_before(kept, place, start)) for place, own in replays
    )


def _draw_alike(old: Segment, new: Segment, skip: int) -> bool:
    """Return whether a segment in force draws what `new` would. Offsets only matter if samples are skipped."""
    if weights_of(old) != weights_of(new):
        return False
    return not skip or [share.offset for share in old.shares] == [share.offset for share in new.shares]


def _origins(identities: Iterable[str], sources: Mapping[str, Identified]) -> dict[str, Origin]:
    """Return the records of those identities that are among the sources."""
    names = {source.identity: name for name, source in sources.items()}
    return {
        identity: Origin(name=names[identity], size=sources[names[identity]].size)
        for identity in identities
        if identity in names
    }
