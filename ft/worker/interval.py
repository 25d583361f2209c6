"""Snapshot interval in steps: the Young/Daly period, updated with every measurement. Pure.

With C the time one snapshot costs training and M the mean time between failures of the whole job, the waste C/t + t/2M
is minimal at t = sqrt(2 C M) (Young 1974; Daly 2006, first order, good for C << M).
"""

import math
from dataclasses import dataclass, replace

SMOOTHING = 0.2
"""Weight of a new measurement in the running mean of each quantity."""
QUIET_STEPS = 3
"""Steps without a snapshot beside them that are measured before the slowdown by snapshots is known."""
UNPAUSED = 8
"""Snapshots after which such steps are made room for, if none have come by themselves."""


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
    """One training step without the cost of a snapshot; with it, until such a step has been measured."""
    copy: float | None = None
    """Time one snapshot adds to training: blocked time and slowdown."""
    commit: float | None = None
    """Time from the grant of the buffer to COMMITTED."""
    quiet: int = 0
    """Number of measured steps without a snapshot beside them."""
    snapshots: int = 0
    slowdown: float = 0.0
    """Time that the steps beside the last snapshot took in excess of a step without one, waiting included."""

    def measured(
        self, *, step: float | None = None, copy: float | None = None, commit: float | None = None
    ) -> "Interval":
        """Return new means with one more measurement of each given quantity."""
        return replace(
            self, step=_mean(self.step, step), copy=_mean(self.copy, copy), commit=_mean(self.commit, commit)
        )

    def stepped(self, seconds: float, *, beside: bool) -> "Interval":
        """Return new means after a step; `beside`: a snapshot was copied or coded meanwhile, or caches were cold."""
        if not math.isfinite(seconds) or seconds < 0:
            return self
        if not beside:
            step = seconds if self.quiet == 0 else _mean(self.step, seconds)
            return replace(self, step=step, quiet=self.quiet + 1)
        if self.quiet == 0 or self.step is None:
            return replace(self, step=_mean(self.step, seconds))
        # A step that is faster than those without a snapshot shows that all steps have become faster.
        step = _mean(self.step, seconds) if seconds < self.step else self.step
        return replace(self, step=step, slowdown=self.slowdown + seconds - self.step)

    def taken(self, *, blocked: float, commit: float | None) -> "Interval":
        """Return new means after a snapshot that training waited `blocked` seconds for."""
        after = self.measured(copy=max(blocked, self.slowdown), commit=commit)
        return replace(after, snapshots=self.snapshots + 1, slowdown=0.0)

    @property
    def steps(self) -> int:
        """Return the steps between snapshots: max(Young/Daly period, commit time), rounded up, at least 1.

        1 until steps and copies have been measured. If snapshots follow each other without a pause, a few pauses show
        what they cost.
        """
        if self.step is None or self.copy is None or self.step <= 0:
            return 1
        pause = QUIET_STEPS if self.quiet < QUIET_STEPS and self.snapshots >= UNPAUSED else 0
        commit = (self.commit or 0.0) + pause * self.step
        period = max(young_daly(self.copy, self.mtbf), commit)
        return max(1, math.ceil(period / self.step - 1e-9))


def _mean(before: float | None, new: float | None) -> float | None:
    if new is None or not math.isfinite(new) or new < 0:
        return before
    return new if before is None else before + SMOOTHING * (new - before)
