"""Protection schemes: the placement of redundancy on nodes, and the costs of saving and restoring."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from keepwarm.ft.groups import Group
from keepwarm.ft.worker.interval import young_daly
from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.cluster import group_numbers


@dataclass(frozen=True, slots=True)
class Restart:
    """Duration from a failure to the next step, in seconds."""

    detection: float
    recovery: float
    """Seconds after detection."""

    def __post_init__(self) -> None:
        if not (self.detection >= 0 and self.recovery >= 0):
            raise SimulationError(f"a restart of {self.total} s cannot contain {self.detection} s of detection")

    @property
    def total(self) -> float:
        return self.detection + self.recovery

    @classmethod
    def within(cls, total: float, detection: float) -> "Restart":
        """Return a restart of `total` seconds, at most `detection` of them for detection."""
        return cls(min(detection, total), max(total - detection, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Durations in seconds, independent of the scheme."""

    interval: float | None = None
    """Training time between snapshots; None until chosen by `tuned`."""
    stall: float
    """Time for which one snapshot pauses training."""
    commit: float = 0.0
    """Time from the end of the stall until the snapshot can be restored."""
    worker: Restart
    node: Restart
    durable: Restart
    """Restart from a checkpoint on shared storage."""
    rebuild: float | None = None
    """Time from the restart until full redundancy; None if the first snapshot after the restart restores it."""
    durable_every: float = 1800.0
    """Training time between durable checkpoints, which agents write without pausing training."""
    durable_lag: float = 0.0
    """Time until such a checkpoint is complete."""

    @property
    def period(self) -> float:
        """Return the interval. Raises ValueError if none has been chosen."""
        if self.interval is None:
            raise ValueError("the interval has not been chosen: call tuned()")
        return self.interval

    @property
    def window(self) -> float:
        """Return the time from a node's failure until full redundancy is restored."""
        rebuild = self.period + self.stall + self.commit if self.rebuild is None else self.rebuild
        return self.node.total + rebuild

    def tuned(self, mtbf: float) -> "Times":
        """Return a copy with an interval: if none is given, Young/Daly's, but at least the commit time and 10 ms.

        No step is shorter than that.
        """
        if self.interval is not None:
            return self
        return replace(self, interval=max(young_daly(self.stall, mtbf), self.commit, 0.01))


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to protect a run."""

    name: str
    groups: tuple[Group, ...] | None
    """Coding groups; None for checkpoints on shared storage only, every `times.interval`."""
    times: Times
    replicas: bool = False
    """Whether the next m members of its group hold copies of a node's state instead of parity."""

    @cached_property
    def group_of(self) -> NDArray[np.int64]:
        return group_numbers(self.groups or ())

    @property
    def code(self) -> tuple[int, int] | None:
        """Return (k, m) of the smallest group, which has the smallest k."""
        if self.groups is None:
            return None
        return min(group.k for group in self.groups), self.groups[0].m

    @property
    def memory(self) -> float:
        """Return the parity or replicas held by a node as a share of the state, maximum over nodes."""
        return max((group.m if self.replicas else group.m / group.k for group in self.groups or ()), default=0.0)


def crowded(groups: Sequence[Group]) -> int:
    """Count the groups that lose data when a single rack fails."""
    return sum(1 for group in groups if group.crowded)
