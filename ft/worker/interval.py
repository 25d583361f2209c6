"""How often to take a snapshot, in steps: the Young/Daly period, recomputed as measurements come in. Pure.

With C the time that one snapshot costs the training and M the mean time between failures of the whole job, the waste
C/t + t/2M is least at t = sqrt(2 C M) (Young 1974; Daly 2006, first order, good for C << M).
"""

import math
from dataclasses import dataclass, replace

SMOOTHING = 0.2
"""Weight of a new measurement in the running mean of each quantity."""


def young_daly(cost: float, mtbf: float) -> float:
    """Seconds between snapshots that waste least, for a cost C >= 0 and a mean time between failures M > 0, both in s.

    Raises `ValueError` for anything else.
    """
    if not (cost >= 0 and mtbf > 0 and math.isfinite(cost)):
        raise ValueError(f"cost {cost} s must be finite and >= 0, mtbf {mtbf} s must be > 0")
    return math.sqrt(2 * cost * mtbf)


def waste(period: float, cost: float, mtbf: float, recovery: float = 0.0) -> float:
    """Share of the time that is lost, to first order: C/t + t/2M + R/M, all in seconds, t > 0, M > 0."""
    return cost / period + period / (2 * mtbf) + recovery / mtbf


@dataclass(frozen=True, slots=True)
class Interval:
    """Running means, in seconds, of what decides `snapshot.every: auto`; None: not measured yet."""

    mtbf: float
    step: float | None = None
    """One training step without a snapshot's cost."""
    copy: float | None = None
    """What one snapshot adds to training: blocked time and slowing down."""
    commit: float | None = None
    """From the grant of the slot to COMMITTED."""

    def measured(
        self, *, step: float | None = None, copy: float | None = None, commit: float | None = None
    ) -> "Interval":
        """With one more measurement of each quantity that is given."""
        return replace(
            self, step=_mean(self.step, step), copy=_mean(self.copy, copy), commit=_mean(self.commit, commit)
        )

    @property
    def steps(self) -> int:
        """Steps from one snapshot to the next: max(Young/Daly, time of a commit), rounded up, at least 1.

        Every step as long as steps and copies have not been measured.
        """
        if self.step is None or self.copy is None or self.step <= 0:
            return 1
        period = max(young_daly(self.copy, self.mtbf), self.commit or 0.0)
        return max(1, math.ceil(period / self.step - 1e-9))


def _mean(before: float | None, new: float | None) -> float | None:
    if new is None or not math.isfinite(new) or new < 0:
        return before
    return new if before is None else before + SMOOTHING * (new - before)
