"""Working state of one protocol step: the next state and the effects emitted so far."""

from typing import Any

from msgspec.structs import replace

from keepwarm.ft.protocol.events import Commit, Effect, Log, Reason, Refuse, Release, Revoke, Send, StopCoding
from keepwarm.ft.protocol.messages import AgentMessage, Known, SnapshotId
from keepwarm.ft.protocol.state import Copy, Mode, Phase, State

REMEMBERED_VOIDS = 16
"""Number of void snapshots up to the watermark `State.newest` that are remembered, so that what is known is not passed
on again. An older one that is heard of is passed on once more, which is harmless."""


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
        failed = self.state.undecodable
        self.set(undecodable=frozenset(each for each in failed if each.snapshot != copy.snapshot))

    # ---- what can never be committed

    def void(self, snapshot: SnapshotId, why: str, sender: int | None = None) -> None:
        """Record that an agent (this one unless `sender` is given) has not stored the snapshot and never will.

        The caller must guarantee this before this agent is the first to say it.
        """
        state = self.state
        if snapshot in state.void or self.superseded(snapshot):
            return
        self.set(
            void=state.void | {snapshot},
            known={key: groups for key, groups in state.known.items() if key != snapshot},
            wants={key: start for key, start in state.wants.items() if key[0] != snapshot},
        )
        self.log("warning", f"snapshot {snapshot} is given up: {why}")
        copy = state.copy(snapshot)
        if copy is not None and copy.open:
            self.drop(copy)
        for worker, waiting in state.waiting:
            if waiting == snapshot:
                self.emit(Refuse(worker, snapshot, Reason.VOID))
        self.set(waiting=tuple(each for each in self.state.waiting if each[1] != snapshot))
        self.send_tree(Known(snapshot=snapshot, void=True), sender)
        self._forget_old_voids()

    def pass_to(self, snapshot: SnapshotId) -> None:
        """Promise never to store a snapshot up to this one that is not held here, and void those heard of."""
        if snapshot.age > self.state.newest:
            self.set(newest=snapshot.age)
        state = self.state
        heard = {*state.known, *(key[0] for key in state.wants), *(waiting for _, waiting in state.waiting)}
        for other in sorted(heard, key=lambda each: each.age):
            if self.passed(other):
                self.void(other, f"slot {state.slot} has gone on to snapshot {snapshot}")
        self._forget_old_voids()

    def passed(self, snapshot: SnapshotId) -> bool:
        """Return whether this agent has not stored a snapshot of this epoch and never will."""
        state, copy = self.state, self.state.copy(snapshot)
        held = copy is not None and (copy.open or copy.committed)
        return (
            snapshot.epoch == state.epoch
            and snapshot.age <= state.newest
            and not held
            and not self.superseded(snapshot)
        )

    def answer_if_void(self, snapshot: SnapshotId, sender: int) -> bool:
        """Tell an agent that speaks of a void snapshot so, and everyone if it was not known. Return whether it is."""
        known = snapshot in self.state.void
        if not known and not self.passed(snapshot):
            return False
        if not known:
            self.void(snapshot, f"slot {sender} has it, and slot {self.state.slot} went on without it")
        if known or sender not in self.state.topology.neighbours(self.state.slot):
            self.emit(Send(sender, Known(snapshot=snapshot, void=True)))
        return True

    def _forget_old_voids(self) -> None:
        state = self.state
        passed = sorted((each for each in state.void if each.age <= state.newest), key=lambda each: each.age)
        if len(passed) > REMEMBERED_VOIDS:
            self.set(void=state.void - set(passed[:-REMEMBERED_VOIDS]))

    # ---- what is known about snapshots

    def send_tree(self, message: AgentMessage, sender: int | None = None) -> None:
        around = self.state.topology.neighbours(self.state.slot)
        self.emit(*(Send(slot, message) for slot in around if slot != sender))

    def superseded(self, snapshot: SnapshotId) -> bool:
        committed = self.state.committed
        return committed is not None and snapshot.age <= committed.age

    def foreign(self, snapshot: SnapshotId, epoch: int = 0) -> bool:
        """Return whether a statement of `epoch` (0: the snapshot's own) does not concern this agent now."""
        state = self.state
        if state.mode is not Mode.ACTIVE or snapshot.run != state.run or (epoch or snapshot.epoch) != state.epoch:
            return True
        return snapshot.epoch != state.epoch and snapshot != state.decided

    def statement_epoch(self, snapshot: SnapshotId) -> int:
        """Return the field `epoch` of a statement about the snapshot: 0 for one of this epoch."""
        return 0 if snapshot.epoch == self.state.epoch else self.state.epoch

    def known(self, snapshot: SnapshotId) -> Known:
        """Return what this agent knows about an unfinished snapshot."""
        groups = tuple(sorted(self.state.known[snapshot]))
        return Known(snapshot=snapshot, prepared=groups, epoch=self.statement_epoch(snapshot))

    def learn(self, snapshot: SnapshotId, groups: frozenset[int], sender: int | None = None) -> None:
        """Record that a snapshot was begun and which groups are PREPARED. `sender` has said so, or None.

        All agents are told that it was begun, the parent also what is PREPARED, and all when that is complete.
        """
        state = self.state
        before = state.known.get(snapshot)
        if self.superseded(snapshot) or snapshot in state.void or (before is not None and groups <= before):
            return
        now = (before or frozenset()) | groups
        self.set(known={**state.known, snapshot: now})
        everything = len(now) == len(state.topology.groups)
        for slot in state.topology.neighbours(state.slot):
            if everything:
                # A peer that reported only some groups must learn of the commit; one that reported the commit need not.
                if slot != sender or groups != now:
                    epoch = self.statement_epoch(snapshot)
                    self.emit(Send(slot, Known(snapshot=snapshot, committed=True, epoch=epoch)))
            elif slot != sender and (slot < state.slot or before is None):
                self.emit(Send(slot, self.known(snapshot)))
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
        self.put(replace(copy, phase=Phase.COMMITTED, whole=True))
        if not copy.whole:
            self.emit(Commit(snapshot))
        for other in self.state.copies:
            if other.candidate and not other.open and other.snapshot.age < snapshot.age:
                self.drop(other)
