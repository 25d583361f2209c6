"""Which ranks keep the others waiting while training goes on, from when each rank began each collective.

All members of a collective leave it when the last one has come. So what a rank computed between two collectives is the
time from the last arrival at the first to its own arrival at the second; the rest of its time it waited. Clocks of the
nodes are taken to agree to within a millisecond or two, as NTP keeps them. Pure, and torch-free.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from trainer.flight_recorder import Flight

LEAST = 0.2
"""Share of its time that a straggler computes, at least: where all wait for something else, nobody is one."""


class Trace(msgspec.Struct, frozen=True, array_like=True):
    """The newest collectives of a rank, oldest first."""

    rank: int
    stage: int
    """Pipeline coordinate: ranks of one stage have equal work."""
    host: str
    flights: tuple[Flight, ...]


class Straggler(msgspec.Struct, frozen=True, kw_only=True):
    """A rank that computes for longer than others of its stage."""

    rank: int
    host: str
    share: float
    """Of its time that it computed, 0 to 1."""
    ratio: float
    """To the median of its stage."""


def computing(traces: Sequence[Trace]) -> dict[int, float]:
    """By rank, the share of its time that it did not wait for others; without ranks of fewer than two collectives.

    What follows a message between two ranks is left out: when it ended is not known.
    """
    last: dict[tuple[str, int], int] = {}
    for trace in traces:
        for one in trace.flights:
            if not one.message:
                key = (one.group, one.number)
                last[key] = max(one.began, last.get(key, 0))
    found = {}
    for trace in traces:
        spent = known = 0
        for one, following in zip(trace.flights, trace.flights[1:], strict=False):
            if not one.message:
                spent += max(0, following.began - last[(one.group, one.number)])
                known += following.began - one.began
        if known > 0:
            found[trace.rank] = min(1.0, spent / known)
    return found


def stragglers(traces: Sequence[Trace], factor: float) -> list[Straggler]:
    """Ranks that compute for more than `factor` times the median of their stage, by rank."""
    shares = computing(traces)
    stages: Mapping[int, list[Trace]] = defaultdict(list)
    for trace in traces:
        if trace.rank in shares:
            stages[trace.stage].append(trace)
    found = []
    for stage in stages.values():
        # The lower one of two middles: of two ranks the faster is what the other is compared with.
        median = statistics.median_low([shares[trace.rank] for trace in stage])
        for trace in stage:
            share = shares[trace.rank]
            if share >= LEAST and share > factor * median:
                ratio = share / max(median, 1e-3)
                found.append(Straggler(rank=trace.rank, host=trace.host, share=share, ratio=ratio))
    return sorted(found, key=lambda one: one.rank)
