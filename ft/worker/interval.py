"""Snapshot interval in steps: the Young/Daly period, updated with every measurement. Pure.

With C the time one snapshot costs training and M the mean time between failures of the whole job, the waste C/t + t/2M
is minimal at t = sqrt(2 C M) (Young 1974; Daly 2006, first order, good for C << M).
"""

import math
from dataclasses import dataclass, replace

SMOOTHING = 0.2
"""Weight of a new measurement in the running mean of each quantity."""


def young_daly(cost: float, mtbf: float) -> float:
    """Return the snapshot period of least waste, for a cost C >= 0 and a mean time between failures M > 0, in seconds.

    Raise `ValueError` for any other input.
    """
    if not (cost >= 0 and mtbf > 0 and math.isfinite(cost)):
        raise ValueError(f"cost {cost} s must be finite and >= 0, mtbf {mtbf} s must be > 0")
    return math.sqrt(2 * cost * mtbf)


def waste(period: float, cost: float, mtbf: float, recovery: float = 0.0) -> float:
    """Return the fraction of time lost, to first order: C/t + t/2M + R/M, all in seconds, t > 0, M > 0."""
    return cost / period + period / (2 * mtbf) + recovery / mtbf


@dataclass(frozen=True, slots=True)
class Interval:
    """Running means, in seconds, of the inputs to `snapshot.every: auto`. None: not measured yet."""

    mtbf: float
    step: float | None = None
    """One training step without the cost of a snapshot."""
    copy: float | None = None
    """Time one snapshot adds to training: blocked time and slowdown."""
    commit: float | None = None
    """Time from the grant of the buffer to COMMITTED."""

    def measured(
        self, *, step: float | None = None, copy: float | None = None, commit: float | None = None
    ) -> "Interval":
        """Return new means with one more measurement of each given quantity."""
        return replace(
            self, step=_mean(self.step, step), copy=_mean(self.copy, copy), commit=_mean(self.commit, commit)
        )

    @property
    def steps(self) -> int:
        """Return the steps between snapshots: max(Young/Daly period, commit time), rounded up, at least 1.

        1 until steps and copies have been measured.
        """
        if self.step is None or self.copy is None or self.step <= 0:
            return 1
        period = max(young_daly(self.copy, self.mtbf), self.commit or 0.0)
        return max(1, math.ceil(period / self.step - 1e-9))


def _mean(before: float | None, new: float | None) -> float | None:
    if new is None or not math.isfinite(new) or new < 0:
        return before
    return new if before is None else before + SMOOTHING * (new - before)
