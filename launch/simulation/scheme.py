"""How a run is protected: which nodes hold what, and what saving and restoring cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from keepwarm.ft.placement import Group
from keepwarm.ft.worker.interval import young_daly
from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.cluster import group_numbers


@dataclass(frozen=True, slots=True)
class Restart:
    """From a failure to the next step, in seconds."""

    detection: float
    recovery: float
    """After detection."""

    def __post_init__(self) -> None:
        if not (self.detection >= 0 and self.recovery >= 0):
            raise SimulationError(f"a restart of {self.total} s cannot contain {self.detection} s of detection")

    @property
    def total(self) -> float:
        return self.detection + self.recovery

    @classmethod
    def within(cls, total: float, detection: float) -> "Restart":
        """`total` seconds, of which `detection` at most."""
        return cls(min(detection, total), max(total - detection, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Seconds; nothing here depends on the scheme."""

    interval: float | None = None
    """Training between two snapshots; None: not chosen yet, see `tuned`."""
    stall: float
    """What one snapshot costs the training."""
    commit: float = 0.0
    """From the end of the stall until a snapshot can be restored."""
    worker: Restart
    node: Restart
    durable: Restart
    """From a checkpoint on shared storage."""
    rebuild: float | None = None
    """From the restart until redundancy is whole; None: the first snapshot after the restart makes it whole."""
    durable_every: float = 1800.0
    """Training between two durable checkpoints, which agents write without stopping the training."""
    durable_lag: float = 0.0
    """Until such a checkpoint is complete."""

    @property
    def period(self) -> float:
        """The interval, which must have been chosen."""
        if self.interval is None:
            raise ValueError("the interval has not been chosen: call tuned()")
        return self.interval

    @property
    def window(self) -> float:
        """From a node's failure until the redundancy that it took is whole again."""
        rebuild = self.period + self.stall + self.commit if self.rebuild is None else self.rebuild
        return self.node.total + rebuild

    def tuned(self, mtbf: float) -> "Times":
        """With the Young/Daly interval where none is given, but not below a commit or 10 ms: a step is no shorter."""
        if self.interval is not None:
            return self
        return replace(self, interval=max(young_daly(self.stall, mtbf), self.commit, 0.01))


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to protect a run."""

    name: str
    groups: tuple[Group, ...] | None
    """None: checkpoints on shared storage only, every `times.interval`."""
    times: Times
    replicas: bool = False
    """Each node's state lies whole on the next m members of its group, rather than as parity."""

    @cached_property
    def group_of(self) -> NDArray[np.int64]:
        return group_numbers(self.groups or ())

    @property
    def code(self) -> tuple[int, int] | None:
        """(k, m) of the smallest group, which has the least of k."""
        if self.groups is None:
            return None
        return min(group.k for group in self.groups), self.groups[0].m

    @property
    def memory(self) -> float:
        """Parity or replicas held, as a share of the state; the largest of any node."""
        return max((group.m if self.replicas else group.m / group.k for group in self.groups or ()), default=0.0)


def crowded(groups: Sequence[Group]) -> int:
    """Groups that lose data when one rack fails."""
    return sum(1 for group in groups if group.crowded)
