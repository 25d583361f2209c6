"""Replay: choose which seen samples are drawn again, as a pure function of a draw's number.

Uniform: a keyed permutation over everything seen, so that no sample repeats before all have been drawn; each pass has
its own key (Ibrahim et al., 2024, draw from the index map of seen data). Power law: draw n picks a past stage with
weight (1 + age)^(-exponent) (after "Catastrophic Interference is Mitigated in Naturalistic Power-Law Learning
Environments", 2024), then one of its samples, both from a counter, with replacement. Torch-free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, Protocol

import msgspec
import numpy as np

from keepwarm.trainer.data.permutation import Permutation, counter_words
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.errors import DataError, SpecError

Law = Literal["uniform", "power"]

Run = tuple[str, int, int]
"""Identity of a source, and a half-open range of its sample numbers k."""

_SHIFT = 32
"""Stage weights are quantised to 2**-32."""


class Identified(Protocol):
    """The properties of a source that ledger and replay use."""

    @property
    def identity(self) -> str:
        """`CONTENT/LENGTH`: hash of the data and tokens per sample; independent of where the files lie."""
        ...

    @property
    def size(self) -> int:
        """Number of samples in one epoch."""
        ...


def content_of(identity: str) -> str:
    """Return the part of an identity shared by the same data cut into samples of different lengths."""
    return identity.rpartition("/")[0]


def length_of(identity: str) -> int:
    """Return the number of tokens per sample."""
    return int(identity.rpartition("/")[2])


class Pool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The samples of a past stage that may be replayed."""

    stage: str
    age: int
    """Number of stages between it and the replaying one: 0 for the latest."""
    runs: tuple[Run, ...]
    """Samples; one seen in two epochs is listed twice, so that replay keeps the mixture of the past."""

    @property
    def size(self) -> int:
        return sum(end - start for _, start, end in self.runs)


class Replay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One replay clause of one stage, with everything that determines its draws."""

    stage: str
    """The replaying stage."""
    law: Law
    exponent: float
    """Exponent of the power law; 0 for uniform."""
    key: str
    """Distinguishes this clause's order from all others: its seed and its place in the history."""
    pools: tuple[Pool, ...]
    """Oldest stage first; none is empty."""
    known: bool = True
    """False for a proxy source: not known to have been seen."""
    cut: tuple[int, int] | None = None
    """Tokens per replayed sample and per sample of this stage, if they differ: row n of the clause then
    holds tokens n * row to (n + 1) * row of its draws, laid end to end."""

    @property
    def identities(self) -> tuple[str, ...]:
        """Sources that may be drawn from."""
        return tuple(dict.fromkeys(source for pool in self.pools for source, _, _ in pool.runs))

    def pieces(self, rows: Ints) -> "Pieces":
        """Return the pieces of replayed samples that rows of the clause, given by number, consist of."""
        assert self.cut is not None
        sample, row = self.cut
        begin, end = rows * row, (rows + 1) * row
        columns: list[tuple[Ints, ...]] = []
        for offset in range(-(-row // sample) + 1):
            draws = begin // sample + offset
            start, stop = np.maximum(begin - draws * sample, 0), np.minimum(end - draws * sample, sample)
            place = np.flatnonzero(stop > 0)
            columns.append((place, draws[place], start[place], stop[place], (draws * sample + start - begin)[place]))
        place, draws, start, stop, column = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        source, k = self.draw(draws)
        return Pieces(place=place, source=source, k=k, start=start, stop=stop, column=column)

    def draw(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Return for each draw, counted from 0 in its stage, an index into `identities` and the sample number k."""
        return _sampler(self).draw(numbers)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Parts of replayed samples, each with the row that it belongs to; all arrays have one entry per piece."""

    place: Ints
    """Index of its row among the requested ones."""
    source: Ints
    """Index of its identity among those of the clause."""
    k: Ints
    start: Ints
    """First token of the sample."""
    stop: Ints
    """Last token plus one."""
    column: Ints
    """Its offset in the row."""


def lengths_of(pools: Sequence[Pool]) -> set[int]:
    """Return the sample lengths in the pools, in tokens."""
    return {length_of(source) for pool in pools for source, _, _ in pool.runs}


def pools_of(
    origins: Sequence[str], past: Sequence[tuple[str, tuple[Run, ...]]], names: Mapping[str, set[str]], where: str
) -> tuple[Pool, ...]:
    """Return what the named stages saw, and what any stage saw of the named sources; everything if there are no
    names."""
    stages = {name for name, _ in past}
    for name in origins:
        if name in stages and name in names:
            raise SpecError(f"{where}: from: {name!r} is both a stage and a source; rename one of them")
        if name not in stages and name not in names:
            raise SpecError(
                f"{where}: from: {name!r} is neither an earlier stage "
                f"({', '.join(sorted(stages)) or 'there are none'}) nor a source ({', '.join(sorted(names))})"
            )
    wanted = {identity for name in origins for identity in names.get(name, ())}
    pools = []
    for index, (stage, runs) in enumerate(past):
        whole = not origins or stage in origins
        chosen = tuple(run for run in runs if whole or run[0] in wanted)
        if chosen:
            pools.append(Pool(stage=stage, age=len(past) - 1 - index, runs=chosen))
    return tuple(pools)


def stand_in_pool(name: str, sources: Mapping[str, Identified], where: str) -> Pool:
    if name not in sources:
        raise DataError(f"{where}: proxy_source: the source {name!r} is not in data.sources")
    source = sources[name]
    return Pool(stage=f"stand-in {name}", age=0, runs=((source.identity, 0, source.size),))


@dataclass(frozen=True, slots=True, eq=False)
class _Sampler:
    replay: Replay
    begins: Ints
    """Index of each run's first sample in the concatenation of all runs of all pools."""
    source: Ints
    """Index of each run's identity."""
    first: Ints
    """First k of each run."""
    pool_begins: tuple[int, ...]
    """Start of each pool in the concatenation, and its end."""
    bounds: tuple[int, ...]
    """Upper bounds of the pools' shares of [0, 2**32)."""

    def draw(self, numbers: Ints) -> tuple[Ints, Ints]:
        places = self._uniform(numbers) if self.replay.law == "uniform" else self._power(numbers)
        run = np.searchsorted(self.begins, places, side="right") - 1
        return self.source[run], self.first[run] + places - self.begins[run]

    def _uniform(self, numbers: Ints) -> Ints:
        size = self.pool_begins[-1]
        passes, within = np.divmod(numbers, size)
        places = np.empty_like(within)
        for number in np.unique(passes):
            chosen = passes == number
            key = f"replay/{self.replay.key}/{int(number)}".encode()
            places[chosen] = Permutation(size, key).forward(within[chosen])
        return places

    def _power(self, numbers: Ints) -> Ints:
        key = f"replay/{self.replay.key}".encode()
        choice = (counter_words(key + b"/stage", numbers) >> np.uint64(64 - _SHIFT)).astype(np.int64)
        pool = np.searchsorted(np.array(self.bounds, np.int64), choice, side="right")
        begins = np.array(self.pool_begins, np.int64)
        sizes = np.diff(begins).astype(np.uint64)[pool]
        return begins[pool] + (counter_words(key + b"/sample", numbers) % sizes).astype(np.int64)


@lru_cache(maxsize=64)
def _sampler(replay: Replay) -> _Sampler:
    runs = [run for pool in replay.pools for run in pool.runs]
    places = {identity: place for place, identity in enumerate(replay.identities)}
    lengths = [end - start for _, start, end in runs]
    return _Sampler(
        replay=replay,
        begins=np.array([0, *accumulate(lengths)][:-1], np.int64),
        source=np.array([places[source] for source, _, _ in runs], np.int64),
        first=np.array([start for _, start, _ in runs], np.int64),
        pool_begins=(0, *accumulate(pool.size for pool in replay.pools)),
        bounds=_bounds(replay),
    )


def _bounds(replay: Replay) -> tuple[int, ...]:
    weights = [(1 + pool.age) ** -replay.exponent for pool in replay.pools]
    total = sum(weights)
    ends = [round(end / total * (1 << _SHIFT)) for end in accumulate(weights)]
    return (*ends[:-1], 1 << _SHIFT)
