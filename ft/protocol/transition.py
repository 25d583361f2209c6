"""Working state of one protocol step: the next state and the effects emitted so far."""

from dataclasses import replace
from typing import Any

from keepwarm.ft.protocol.events import Commit, Effect, Log, Reason, Refuse, Release, Revoke, Send, StopCoding
from keepwarm.ft.protocol.messages import AgentMessage, Known, SnapshotId
from keepwarm.ft.protocol.state import Copy, Mode, Phase, State


class Transition:
    """The changes of one event. Lives only as long as the `keepwarm.ft.protocol.step.step` call that created it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.effects: list[Effect] = []

    def set(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)

    def put(self, copy: Copy) -> Copy:
        """Replace the copy of the same snapshot, or add it."""
        others = tuple(other for other in self.state.copies if other.snapshot != copy.snapshot)
        self.set(copies=tuple(sorted((*others, copy), key=lambda each: each.snapshot.age)))
        return copy

    def emit(self, *effects: Effect) -> None:
        self.effects.extend(effects)

    def log(self, level: str, text: str) -> None:
        self.emit(Log(level, text))

    def send_group(self, message: AgentMessage) -> None:
        self.emit(*(Send(slot, message) for slot in self.state.group.members if slot != self.state.slot))

    def free_buffers(self) -> tuple[int | None, int | None]:
        """Return a free data buffer and a free parity buffer. None: none is free (or the group has no parity)."""
        state = self.state
        data = set(range(state.data_buffers)) - {copy.data for copy in state.copies}
        parity = set(range(state.parity_buffers)) - {copy.parity for copy in state.copies}
        return min(data, default=None), min(parity, default=None)

    def drop(self, copy: Copy) -> None:
        """Discard a copy. Its data buffer stays in use while a worker may write to it or the disk tier reads it."""
        if copy.open:
            self.emit(StopCoding(copy.snapshot))
        keep = copy.writers or copy.held
        if copy.parity is not None or not keep:
            self.emit(Release(copy.snapshot, None if keep else copy.data, copy.parity))
        if copy.phase is not Phase.DRAINING:
            self.emit(*(Revoke(worker, copy.snapshot) for worker in sorted(copy.writers)))
        if keep:
            phase = Phase.DRAINING if copy.writers else Phase.DURABLE
            self.put(replace(copy, phase=phase, parity=None, coding={}, good={}, members={}))
        else:
            self.set(copies=tuple(other for other in self.state.copies if other.snapshot != copy.snapshot))

    def void(self, snapshot: SnapshotId, why: str, sender: int | None = None) -> None:
        """Record that an agent (this one unless `sender` is given) has not stored the snapshot and never will.

        The caller must guarantee this before this agent is the first to say it.
        """
        state = self.state
        if snapshot in state.void or self.superseded(snapshot):
            return
        self.set(void=state.void | {snapshot})
        self.log("warning", f"snapshot {snapshot} is given up: {why}")
        copy = state.copy(snapshot)
        if copy is not None and copy.open:
            self.drop(copy)
        for worker, waiting in state.waiting:
            if waiting == snapshot:
                self.emit(Refuse(worker, snapshot, Reason.VOID))
        self.set(waiting=tuple(each for each in state.waiting if each[1] != snapshot))
        self.send_tree(Known(snapshot=snapshot, void=True), sender)

    def send_tree(self, message: Known, sender: int | None = None) -> None:
        around = self.state.topology.neighbours(self.state.slot)
        self.emit(*(Send(slot, message) for slot in around if slot != sender))

    def superseded(self, snapshot: SnapshotId) -> bool:
        committed = self.state.committed
        return committed is not None and snapshot.age <= committed.age

    def foreign(self, snapshot: SnapshotId) -> bool:
        """Return whether a message about the snapshot does not concern this agent now."""
        state = self.state
        return state.mode is not Mode.ACTIVE or snapshot.run != state.run or snapshot.epoch != state.epoch

    def learn(self, snapshot: SnapshotId, groups: frozenset[int], sender: int | None = None) -> None:
        """Record PREPARED groups: tell the parent what is new and the children when complete, then commit."""
        state = self.state
        before = state.known.get(snapshot, frozenset())
        if self.superseded(snapshot) or groups <= before:
            return
        now = before | groups
        self.set(known={**state.known, snapshot: now})
        everything = len(now) == len(state.topology.groups)
        message = Known(snapshot=snapshot, committed=True) if everything else None
        for slot in state.topology.neighbours(state.slot):
            if message is not None and slot != sender:
                self.emit(Send(slot, message))
            elif slot < state.slot and slot != sender:
                self.emit(Send(slot, Known(snapshot=snapshot, prepared=tuple(sorted(now)))))
        if everything:
            self.commit(snapshot)

    def commit(self, snapshot: SnapshotId) -> None:
        """Commit a snapshot whose groups are all PREPARED. It replaces the ones before it."""
        state, copy = self.state, self.state.copy(snapshot)
        if snapshot in state.void or (copy is not None and state.slot not in copy.members):
            self.log("error", f"snapshot {snapshot} is said to be committed and cannot be; a defect, please report it")
            return
        self.set(
            committed=snapshot,
            known={key: groups for key, groups in state.known.items() if key.age > snapshot.age},
            void=frozenset(key for key in state.void if key.age > snapshot.age),
            wants={key: start for key, start in state.wants.items() if key[0].age > snapshot.age},
        )
        if copy is None:
            return
        self.put(replace(copy, phase=Phase.COMMITTED))
        self.emit(Commit(snapshot))
        for other in self.state.copies:
            if other.committed and other.snapshot != snapshot:
                self.drop(other)
