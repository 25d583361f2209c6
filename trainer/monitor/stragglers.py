"""Which ranks keep the others waiting while training goes on, from when each rank began each collective.

All members of a collective leave it together, some time after the last one has come. So what a rank needs longer than
the fastest member until each begins its next collective is its own doing: `excess`. What communication takes, a slow
network or a starved thread of it included, is in nobody's excess. Clocks of the nodes are taken to agree to within a
millisecond or two, as NTP keeps them. Pure, and torch-free.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from keepwarm.trainer.monitor.flight_recorder import Flight


class Trace(msgspec.Struct, frozen=True, array_like=True):
    """The newest collectives of a rank, oldest first."""

    rank: int
    stage: int
    """Pipeline coordinate: ranks of one stage have equal work."""
    host: str
    flights: tuple[Flight, ...]


class Straggler(msgspec.Struct, frozen=True, kw_only=True):
    """A rank that is slower than others of its stage."""

    rank: int
    host: str
    share: float
    """Of the time that training would save if it was as fast as the median of its stage, 0 to 1."""
    ratio: float
    """How many times longer everything takes because of it."""


def excess(traces: Sequence[Trace]) -> dict[int, float]:
    """By rank, the share of its time by which it was slower than the fastest members of the collectives it left.

    Without ranks of fewer than two collectives. What follows a message between two ranks is left out: when it ended is
    not known.
    """
    last: dict[tuple[str, int], int] = {}
    first: dict[tuple[str, int], int] = {}
    for trace in traces:
        for one in trace.flights:
            last[_key(one)] = max(one.began, last.get(_key(one), 0))
        for one, following in _pairs(trace):
            first[_key(one)] = min(following.began, first.get(_key(one), following.began))
    found = {}
    for trace in traces:
        slower = known = 0
        for one, following in _pairs(trace):
            slower += max(0, following.began - max(last[_key(one)], first[_key(one)]))
            known += following.began - one.began
        if known > 0:
            found[trace.rank] = slower / known
    return found


def stragglers(traces: Sequence[Trace], factor: float) -> list[Straggler]:
    """Ranks because of which everything takes more than `factor` times as long, by rank."""
    shares = excess(traces)
    stages: Mapping[int, list[Trace]] = defaultdict(list)
    for trace in traces:
        if trace.rank in shares:
            stages[trace.stage].append(trace)
    found = []
    for stage in stages.values():
        # The lower one of two middles: of two ranks the faster is what the other is compared with.
        median = statistics.median_low([shares[trace.rank] for trace in stage])
        for trace in stage:
            share = shares[trace.rank] - median
            if (ratio := 1 / max(1 - share, 1e-3)) > factor:
                found.append(Straggler(rank=trace.rank, host=trace.host, share=share, ratio=ratio))
    return sorted(found, key=lambda one: one.rank)


def _key(flight: Flight) -> tuple[str, int]:
    return flight.group, flight.number


def _pairs(trace: Trace) -> Iterator[tuple[Flight, Flight]]:
    """Each collective of a rank, and what it began next."""
    return (
        (one, following) for one, following in zip(trace.flights, trace.flights[1:], strict=False) if not one.message
    )
