"""Find the ranks that keep others waiting, from the times at which each rank began each collective.

All members leave a collective together, some time after the last one has entered. If a rank takes longer than the
fastest member until it begins its next collective, the difference is its own: its `excess`. Communication time,
including a slow network or a starved communication thread, counts towards no rank's excess. Node clocks are assumed to
agree to within a millisecond or two, as with NTP.

On GPUs processes run ahead, so these times say nothing. There the time that each collective took on each GPU is
compared: it includes the wait for later ranks, so that the last rank's is the shortest. No clocks are compared. And all
GPUs are timed by themselves, with the same product: one that is slowed down is found even where others hide its delay.

Pure and torch-free.
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
    """Pipeline coordinate: ranks of the same stage have equal work."""
    host: str
    flights: tuple[Flight, ...]
    product: float = 0.0
    """Seconds that its GPU needs for a fixed product; 0: not measured."""


class Straggler(msgspec.Struct, frozen=True, kw_only=True):
    """A rank that is slower than the others of its stage."""

    rank: int
    host: str
    share: float
    """Fraction of the time, from 0 to 1, that training would save if the rank were as fast as its stage's median."""
    ratio: float
    """Factor by which the rank slows the job down."""


def excess(traces: Sequence[Trace]) -> dict[int, float]:
    """Return, by rank, the fraction of its time by which it was slower than the fastest members of its collectives.

    Omits ranks with fewer than two collectives. Time after a point-to-point message is ignored, since its end is
    unknown.
    """
    if any(one.lasted is not None for trace in traces for one in trace.flights):
        return _excess_on_gpus(traces)
    last: dict[tuple[str, int], int] = {}
    first: dict[tuple[str, int], int] = {}
    for trace in traces:
        for one in trace.flights:
            last[_key(one)] = max(one.began, last.get(_key(one), 0))
        for one, following in _pairs(trace):
            first[_key(one)] = min(following.began, first.get(_key(one), following.began))
    result = {}
    for trace in traces:
        slower = known = 0
        for one, following in _pairs(trace):
            slower += max(0, following.began - max(last[_key(one)], first[_key(one)]))
            known += following.began - one.began
        if known > 0:
            result[trace.rank] = slower / known
    return result


def _excess_on_gpus(traces: Sequence[Trace]) -> dict[int, float]:
    """Return what `excess` does, from the time that collectives took on the GPUs."""
    longest: dict[tuple[str, int], int] = {}
    measured = {
        trace.rank: [(_key(one), one.began, one.lasted) for one in trace.flights if one.lasted and not one.message]
        for trace in traces
    }
    for flights in measured.values():
        for key, _, lasted in flights:
            longest[key] = max(lasted, longest.get(key, 0))
    result = {}
    for rank, flights in measured.items():
        known = flights[-1][1] - flights[0][1] if flights else 0
        if known > 0:
            slower = sum(longest[key] - lasted for key, _, lasted in flights)
            result[rank] = min(slower / known, 1.0)
    return result


def stragglers(traces: Sequence[Trace], factor: float) -> list[Straggler]:
    """Return the ranks that slow the job down, or whose GPUs are slower than others, by more than `factor`, by rank."""
    late = {one.rank: one for one in _late(traces, factor)}
    slow = {one.rank: one for one in _slow(traces, factor)}
    return [late.get(rank) or slow[rank] for rank in sorted(late.keys() | slow.keys())]


def _slow(traces: Sequence[Trace], factor: float) -> list[Straggler]:
    """Return the ranks whose GPUs need more than `factor` times the median for the same product."""
    measured = {trace.rank: trace.product for trace in traces if trace.product > 0}
    if len(measured) < 2:
        return []
    median = statistics.median_low(list(measured.values()))
    return [
        Straggler(rank=trace.rank, host=trace.host, share=1 - median / trace.product, ratio=trace.product / median)
        for trace in traces
        if trace.rank in measured and trace.product > factor * median
    ]


def _late(traces: Sequence[Trace], factor: float) -> list[Straggler]:
    """Return the ranks for which the others of their stage wait."""
    shares = excess(traces)
    stages: Mapping[int, list[Trace]] = defaultdict(list)
    for trace in traces:
        if trace.rank in shares:
            stages[trace.stage].append(trace)
    result = []
    for stage in stages.values():
        # The lower of the two middle values: with two ranks, the slower one is compared with the faster.
        median = statistics.median_low([shares[trace.rank] for trace in stage])
        for trace in stage:
            share = shares[trace.rank] - median
            if (ratio := 1 / max(1 - share, 1e-3)) > factor:
                result.append(Straggler(rank=trace.rank, host=trace.host, share=share, ratio=ratio))
    return result


def _key(flight: Flight) -> tuple[str, int]:
    return flight.group, flight.number


def _pairs(trace: Trace) -> Iterator[tuple[Flight, Flight]]:
    """Yield each collective of a rank with what it began next."""
    return (
        (one, following) for one, following in zip(trace.flights, trace.flights[1:], strict=False) if not one.message
    )
