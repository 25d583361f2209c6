"""The workers of all nodes: they offer steps, write, give up, die and restore as the real ones do.

No worker is more than one step ahead of another, because every step needs all of them. When a rank dies, all are
started again and restore; when an agent dies, training goes on, and the next snapshot starts an empty one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.model_checker import port
from tests.model_checker.port import SnapshotId, events
from tests.model_checker.simulated.content import Age, written

if TYPE_CHECKING:
    from tests.model_checker.simulated.node import Node
    from tests.model_checker.simulated.world import World

SILENT = port.gives_up_silently()


@dataclass
class Worker:
    """One worker process. `step` is the last one that it offered."""

    slot: int
    number: int
    state: str = "gone"
    step: int = 0
    epoch: int = 0
    restored: int = 0
    """The epoch whose choice it has restored. Its agent may have begun another one since."""
    incarnation: int = 0
    """Incarnation of the agent that it is attached to."""
    snapshot: SnapshotId = field(default_factory=lambda: SnapshotId("run", 0, 0, "layout"))
    buffer: int = 0
    answer: Any = None
    revoked: set[Age] = field(default_factory=set)
    doomed: bool = False
    """It is to end because all ranks are started again."""


class Trainer:
    """All workers, by slot."""

    def __init__(self, world: World) -> None:
        self.world = world
        count = world.setting.workers
        self.workers = [[Worker(slot, number) for number in range(count)] for slot in range(world.slots)]
        self.all = [worker for each in self.workers for worker in each]
        self.restarting, self.target = True, 1
        self.limit: int | None = None
        """Steps beyond this one are not begun. None: no limit."""

    # ---- what agents tell workers

    def told(self, slot: int, effect: Any) -> None:
        worker = self.workers[slot][effect.worker]
        if isinstance(effect, events.Revoke):
            worker.revoked.add(effect.snapshot.age)
        elif worker.state == "opening" and worker.snapshot == effect.snapshot:
            worker.answer = effect

    def epoch_began(self, slot: int, epoch: int) -> None:
        for worker in self.workers[slot]:
            worker.epoch = max(worker.epoch, epoch)

    def writers(self, slot: int, buffer: int) -> list[Worker]:
        """Return the workers that may write to a buffer now."""
        return [
            worker for worker in self.workers[slot] if worker.state in ("granted", "half") and worker.buffer == buffer
        ]

    # ---- what workers do

    def act(self, worker: Worker) -> bool:
        """Let a worker do the next thing. Return whether there was any."""
        node = self.world.nodes[worker.slot]
        if worker.doomed:
            self._end(worker, node)
            return True
        attached = node.alive and worker.incarnation == node.state.incarnation
        if not attached and worker.state not in ("gone", "idle"):
            if not self._writes_on(worker, node):
                if self.restarting and (node.kept or node.took_up):  # this start fails, the next asks for a later epoch
                    self.target = 0
                worker.state = "gone" if self.restarting else "idle"
            return True
        return bool(getattr(self, f"_{worker.state}")(worker, node))

    def attached(self, node: Node) -> set[int]:
        """Return the workers that have mapped an agent's memory."""
        return {
            worker.number
            for worker in self.workers[node.slot]
            if worker.state != "gone" and (worker.incarnation == node.state.incarnation or worker.number in node.former)
        }

    def _writes_on(self, worker: Worker, node: Node) -> bool:
        """Write on after the agent has died, as a worker does that has not noticed. Return whether it was writing."""
        mapped = worker.number in node.former if node.alive else node.kept
        if not mapped or worker.state not in ("granted", "half"):
            return False
        self._fill(worker, node, "half" if worker.state == "granted" else "idle")
        return True

    def _idle(self, worker: Worker, node: Node) -> bool:
        if self.restarting or (self.limit is not None and worker.step >= self.limit):
            return False
        if any(other.step < worker.step for other in self.all):
            return False
        if not node.alive or worker.incarnation != node.state.incarnation:
            return self._attach(worker)
        worker.step += 1
        worker.snapshot = SnapshotId("run", worker.epoch, worker.step, "layout")
        worker.state, worker.answer = "opening", None
        node.dispatch(events.WorkerOpened(worker.number, worker.snapshot, self.world.setting.wait))
        return True

    def _opening(self, worker: Worker, node: Node) -> bool:
        if worker.answer is None:
            return False
        worker.state = "idle"
        if isinstance(worker.answer, events.Grant):
            worker.state, worker.buffer = "granted", worker.answer.buffer
        return True

    def _granted(self, worker: Worker, node: Node) -> bool:
        return self._write(worker, node, "half")

    def _half(self, worker: Worker, node: Node) -> bool:
        return self._write(worker, node, "written")

    def _write(self, worker: Worker, node: Node, then: str) -> bool:
        """Write half of the worker's part, unless its agent has revoked it."""
        if worker.snapshot.age in worker.revoked:
            worker.state = "idle"
            node.dispatch(events.WorkerCancelled(worker.number, worker.snapshot))
            return True
        self._fill(worker, node, then)
        return True

    def _fill(self, worker: Worker, node: Node, then: str) -> None:
        """Write the first half of the worker's part, or else the second one."""
        first, stop = self._part(worker)
        middle = (first + stop + 1) // 2
        for bucket in range(first, middle) if then == "half" else range(middle, stop):
            node.memory.data[worker.buffer][bucket] = written(worker.snapshot.age, worker.slot, bucket)
        worker.state = then

    def _part(self, worker: Worker) -> tuple[int, int]:
        geometry = self.world.setting.geometry(worker.slot)
        first = sum(geometry.parts[: worker.number])
        return first, first + geometry.parts[worker.number]

    def _written(self, worker: Worker, node: Node) -> bool:
        worker.state = "idle"
        first, stop = self._part(worker)
        sums = tuple(written(worker.snapshot.age, worker.slot, bucket) for bucket in range(first, stop))
        node.dispatch(events.WorkerSealed(worker.number, worker.snapshot, sums))
        return True

    def give_up(self, worker: Worker) -> bool:
        """End a wait for a buffer, or a copy that takes too long, as the worker's client does."""
        node = self.world.nodes[worker.slot]
        if not node.alive or worker.incarnation != node.state.incarnation or worker.doomed:
            return False
        copying = worker.state in ("granted", "half")
        if not copying and (worker.state != "opening" or worker.answer is not None):
            return False
        worker.state = "idle"
        if copying or not SILENT:
            node.dispatch(events.WorkerCancelled(worker.number, worker.snapshot))
        return True

    # ---- starting again

    def rank_died(self, worker: Worker) -> None:
        """All ranks are to be started again."""
        self.restarting, self.target = True, 0
        for each in self.all:
            each.doomed = each.state != "gone"
        if worker.doomed:
            self._end(worker, self.world.nodes[worker.slot])

    def _end(self, worker: Worker, node: Node) -> None:
        worker.doomed, worker.state, worker.answer = False, "gone", None
        worker.revoked.clear()
        if node.alive and worker.incarnation == node.state.incarnation:
            node.dispatch(events.WorkerLost(worker.number))
        elif node.alive:
            node.worker_done(worker.number)

    def _attach(self, worker: Worker) -> bool:
        """Attach all workers of a slot, after starting its agent where there is none. Return False if one still writes.

        Each ends what it was copying first.
        """
        slot = worker.slot
        if any(each.state in ("granted", "half") for each in self.workers[slot]):
            return False
        if not self.world.nodes[slot].alive:
            self.world.start(slot)
        node = self.world.nodes[slot]
        for each in self.workers[slot]:
            each.incarnation = node.state.incarnation
            each.epoch = max(node.state.epoch, self.world.newest_epoch)  # a new client knows no other
            node.worker_done(each.number)
        node.dispatch(events.Configured(self.world.setting.geometry(slot)))
        return True

    def _gone(self, worker: Worker, node: Node) -> bool:
        if any(each.doomed for each in self.all):
            return False
        unknown = not node.alive or worker.incarnation != node.state.incarnation or node.state.geometry is None
        if unknown and not self._attach(worker):
            return False
        if not self.restarting:
            worker.state = "idle"
            return True
        self.target = self.target or max(self.world.newest_epoch, *(each.state.epoch for each in self.world.nodes)) + 1
        worker.state = "restoring"
        return self._ask(worker)

    def _ask(self, worker: Worker) -> bool:
        node = self.world.nodes[worker.slot]
        if self.target >= node.state.epoch:
            node.election.begin(self.target)
        return True

    def _restoring(self, worker: Worker, node: Node) -> bool:
        if not node.state.restorable or node.state.epoch < self.target:
            return False
        if node.state.decided is not None:
            self.world.truth.restored(node, node.state.decided)
            worker.step = node.state.decided.step
        else:
            worker.step = 0
        worker.state, worker.epoch, worker.restored = "ready", node.state.epoch, node.state.epoch
        return True

    def _ready(self, worker: Worker, node: Node) -> bool:
        """Train on once all have restored the same epoch. Others ask again."""
        if any(each.state != "ready" or each.doomed for each in self.all):
            return False
        epochs = {each.restored for each in self.all}
        if len(epochs) == 1:
            self.restarting = False
        self.target = max(epochs)
        for each in self.all:
            each.state = "idle" if len(epochs) == 1 else "restoring"
            self._ask(each)
        return True
