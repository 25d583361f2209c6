"""The order in which sources take turns: a table in which every prefix has the right shares.

The table is Tijdeman's solution of the chairman assignment problem (R. Tijdeman, 1980): with k sources of shares w_i,
the number of samples that source i gave among the first t differs from w_i * t by at most 1 - 1/(2k - 2). NumPy only.
"""

import heapq
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One period of the order in which sources take turns, repeated indefinitely; at most 65,536 entries."""

    units: tuple[int, ...]
    """Number of samples that each source gives in one period."""
    turns: npt.NDArray[np.int32]
    """Source of each sample of the period."""
    earlier: npt.NDArray[np.int32]
    """For each sample of the period, the number of samples that its source gave before it in the period."""
    places: tuple[npt.NDArray[np.int32], ...]
    """For each source, the indices of its samples in the period, ascending."""

    @property
    def period(self) -> int:
        return len(self.turns)

    def samples_at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return the source of each position, and the number of samples that it gave before."""
        periods, places = np.divmod(positions, self.period)
        source = self.turns[places].astype(np.int64)
        return source, periods * np.asarray(self.units, np.int64)[source] + self.earlier[places]

    def counts_before(self, position: int) -> tuple[int, ...]:
        """Return the number of samples that each source gives at positions below `position`."""
        periods, place = divmod(position, self.period)
        return tuple(
            periods * units + int(np.searchsorted(places, place))
            for units, places in zip(self.units, self.places, strict=True)
        )


@lru_cache(maxsize=32)
def table(units: tuple[int, ...]) -> Table:
    """Return the table for sources with these positive integer weights."""
    divisor = gcd(*units)
    reduced = tuple(unit // divisor for unit in units)
    turns = np.fromiter(_turns(reduced), np.int32, count=sum(reduced))
    places = tuple(np.flatnonzero(turns == source).astype(np.int32) for source in range(len(reduced)))
    earlier = np.empty_like(turns)
    for own in places:
        earlier[own] = np.arange(len(own), dtype=np.int32)
    return Table(reduced, turns, earlier, places)


def _turns(units: tuple[int, ...]) -> list[int]:
    """Return Tijdeman's order, computed as earliest deadline first.

    With c = 1/(2k - 2), his rule "among the sources with w_i t - given_i >= c take the smallest (1 - c - (w_i t -
    given_i)) / w_i" gives the j-th sample of a source (from 0) a release time ceil((j + c) / w_i) and a deadline (j + 1
    - c) / w_i that do not depend on t.
    """
    if len(units) == 1:
        return [0] * units[0]
    period, parts = sum(units), 2 * len(units) - 2

    def job(source: int, j: int) -> tuple[int, int, int, int]:
        scale = parts * units[source]
        release = -(-(parts * j + 1) * period // scale)
        deadline = (parts * (j + 1) - 1) * period // scale
        return release, deadline, source, j

    waiting = [job(source, 0) for source in range(len(units))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    turns: list[int] = []
    for t in range(1, period + 1):
        while waiting and waiting[0][0] <= t:
            heapq.heappush(ready, heapq.heappop(waiting)[1:])
        _, source, j = heapq.heappop(ready)
        turns.append(source)
        if j + 1 < units[source]:
            heapq.heappush(waiting, job(source, j + 1))
    return turns
