"""Walk a failure history and account for every second of it. Deterministic."""

import math
from collections import defaultdict, deque
from dataclasses import dataclass, fields

from keepwarm.launch.simulation.cluster import Cluster
from keepwarm.launch.simulation.failures import Failures, Kind
from keepwarm.launch.simulation.scheme import Scheme


@dataclass(slots=True)
class Ledger:
    """Seconds of one history by cause, which add up to its length, and counts of events."""

    productive: float = 0.0
    stall: float = 0.0
    """Pauses of training for snapshots."""
    lost: float = 0.0
    """Work since the restored snapshot, which had to be redone."""
    detection: float = 0.0
    recovery: float = 0.0
    waiting: float = 0.0
    """Waiting for a spare."""
    failures: int = 0
    from_memory: int = 0
    from_durable: int = 0
    losses: int = 0
    """Number of times that memory was lost, because more than m nodes of some group were gone."""
    groups_lost: int = 0
    """Number of groups lost; one rack failure can take several."""

    @property
    def seconds(self) -> float:
        return self.productive + self.stall + self.lost + self.detection + self.recovery + self.waiting


SECONDS = tuple(field.name for field in fields(Ledger) if field.type is float)


def walk(failures: Failures, horizon: float, cluster: Cluster, scheme: Scheme) -> Ledger:
    """Account for the seconds until `horizon`.

    Between failures, training alternates between `interval` of work and `stall`. A failure stops it for detection,
    waiting for as many nodes as died, and recovery; work since the last committed snapshot is redone. Another failure
    during this time restarts the recovery. Lost nodes accumulate until redundancy is complete; if a group loses more
    than m of them, the run returns to the durable checkpoint, and depends on it until a new snapshot is committed.
    """
    history = _History(cluster, scheme)
    events = zip(failures.times.tolist(), failures.kinds.tolist(), failures.nodes.tolist(), strict=True)
    for time, kind, node in events:
        history.fail(time, kind, node)
    return history.end(horizon)


class _History:
    def __init__(self, cluster: Cluster, scheme: Scheme) -> None:
        self.cluster, self.times = cluster, scheme.times
        self.ledger = Ledger()
        self.group_of = None if scheme.groups is None else scheme.group_of.tolist()
        self.m = scheme.groups[0].m if scheme.groups else 0
        self.clock = self.detected = self.supplied = self.resumed = 0.0
        self.begun = self.saved = self.durable = 0.0  # work, in seconds of training
        self.reached = 0.0
        self.in_memory = False
        """Whether there is a committed snapshot to restore."""
        self.whole = 0.0
        self.erased: defaultdict[int, set[int]] = defaultdict(set)
        self.available: deque[float] = deque([0.0] * cluster.spares)
        """Times at which the nodes outside the run can take a slot, ascending because all repairs take equally long."""
        self.filled: dict[int, float] = {}
        """Times at which slots that are or were vacant get a node."""

    def fail(self, now: float, kind: int, node: int) -> None:
        struck = [node] if kind != Kind.RACK else list(self.cluster.rack_of(node))
        struck = [slot for slot in struck if self.filled.get(slot, 0.0) <= now]
        if not struck:
            return
        self._pass_until(now)
        if now >= self.whole:
            self.erased.clear()
        self.supplied = max(self.supplied, now)
        if kind != Kind.WORKER:
            self._replace(struck, now)
            self._erase(struck)
        self.ledger.failures += 1
        self._restart(now, kind)

    def end(self, horizon: float) -> Ledger:
        self._pass_until(horizon)
        self.ledger.productive = self.reached
        return self.ledger

    def _pass_until(self, now: float) -> None:
        ledger, clock = self.ledger, self.clock
        ledger.detection += max(min(now, self.detected) - clock, 0.0)
        ledger.waiting += max(min(now, self.supplied) - max(clock, self.detected), 0.0)
        ledger.recovery += max(min(now, self.resumed) - max(clock, self.detected, self.supplied), 0.0)
        self.clock = now
        if now > self.resumed:
            self._train(now - self.resumed)

    def _train(self, elapsed: float) -> None:
        times = self.times
        cycle = times.period + times.stall
        done = self._work(elapsed)
        self.ledger.stall += elapsed - done
        self.reached = self.begun + done
        # Tolerance for rounding: a snapshot that is complete up to rounding counts as complete.
        committed = math.floor((elapsed - times.commit) / cycle + 1e-9)
        if committed > 0 and self.group_of is None:
            self.durable = self.begun + committed * times.period
        elif committed > 0:
            self.saved, self.in_memory = self.begun + committed * times.period, True
        if self.group_of is not None and elapsed > times.durable_lag:
            written = self.begun + self._work(elapsed - times.durable_lag)
            self.durable = max(self.durable, math.floor(written / times.durable_every) * times.durable_every)

    def _work(self, elapsed: float) -> float:
        cycles, rest = divmod(elapsed, self.times.period + self.times.stall)
        return cycles * self.times.period + min(rest, self.times.period)

    def _replace(self, struck: list[int], now: float) -> None:
        for slot in struck:
            self.available.append(now + self.cluster.repair)
            self.filled[slot] = max(now, self.available.popleft())
            self.supplied = max(self.supplied, self.filled[slot])

    def _erase(self, struck: list[int]) -> None:
        if self.group_of is None or not self.in_memory:
            return
        for slot in struck:
            self.erased[self.group_of[slot]].add(slot)
        lost = sum(1 for slots in self.erased.values() if len(slots) > self.m)
        if lost:
            self.ledger.losses += 1
            self.ledger.groups_lost += lost
            self.in_memory = False
            self.erased.clear()

    def _restart(self, now: float, kind: int) -> None:
        times = self.times
        if self.in_memory:
            worker_only = kind == Kind.WORKER and not self.erased
            restart, target = (times.worker if worker_only else times.node), self.saved
            self.ledger.from_memory += 1
        else:
            restart, target = times.durable, self.durable
            self.ledger.from_durable += 1
        self.ledger.lost += self.reached - target
        self.begun = self.saved = self.reached = target
        self.detected = now + restart.detection
        self.resumed = max(self.detected, self.supplied) + restart.recovery
        self.whole = self.resumed + times.window - times.node.total
