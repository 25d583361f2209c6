"""The pure protocol of many members over a network in virtual time, with what its shell does reduced to the least.

A bucket is its checksum, a chunk of parity the set of checksums that were added to it. Links never lose anything but
with their ends. Elections follow the rule of `keepwarm.ft.agent.recovery_election`: all tell their near agents and the
lowest slot of the epoch, the lowest slot gathers, chooses once and tells all.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from keepwarm.ft.protocol import events, messages, restore_choice
from keepwarm.ft.protocol.messages import ChunkRecord, SnapshotId, digest
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.protocol.state import Geometry, Mode, State, Topology, initial
from keepwarm.ft.protocol.step import step
from tests.simulated.machine import FOLDER_S, WORK_S
from tests.simulated.timeline import Timeline
from tests.simulated.training import LAYOUT, LOCAL_S, WRITE_S
from tests.simulated.wires import Wires

FRAME = 4 + 16
"""Bytes of a frame besides its message: its length and its MAC."""
BUCKET = 4096


@cache
def _sum(snapshot: SnapshotId, slot: int, bucket: int) -> int:
    return digest((snapshot.epoch, snapshot.step, slot, bucket))


def _whole(state: State) -> bool:
    return state.mode is Mode.ACTIVE and state.decided is not None and state.committed == state.decided


class Member:
    """One agent: its state, and what it is rebuilding."""

    def __init__(self, slot: int, incarnation: int, topology: Topology) -> None:
        self.state: State = initial("run", slot, incarnation, topology)
        self.parity: dict[tuple[SnapshotId, int], set[int]] = {}
        self.gathered: dict[tuple[SnapshotId, int], set[int]] = {}
        self.orders: dict[tuple[SnapshotId, int], messages.Decode] = {}


class Protocol:
    """All members of a job, its wires, and the counts of what passed over them."""

    def __init__(self, groups: Sequence[tuple[Sequence[int], int]]) -> None:
        self.topology = Topology(tuple(StripeGroup(i, tuple(each), m) for i, (each, m) in enumerate(groups)))
        self.slots = self.topology.slots
        self.timeline = Timeline()
        self.wires = Wires(self.timeline)
        self.sent: collections.Counter[str] = collections.Counter()
        self.peers: list[set[int]] = [set() for _ in range(self.slots)]
        """Slots that a slot has exchanged anything with."""
        self.commits: dict[SnapshotId, dict[int, float]] = {}
        self.offered: dict[SnapshotId, float] = {}
        self.answered = self.whole = 0
        """Members that have all data of what the newest epoch restores, and that know it to be whole on all."""
        self._incarnations = self.slots
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._inventories: dict[int, messages.Inventory] = {}
        self._plans: dict[int, tuple[messages.Decision, Any]] = {}
        self.members = [Member(slot, slot + 1, self.topology) for slot in range(self.slots)]
        self.effects: dict[type, Callable[[int, Any, Any], None]] = {
            events.Send: lambda slot, effect, _: self.send(slot, effect.to, effect.message),
            events.SendChunk: self._send_chunk, events.Verify: self._verify, events.Accumulate: self._accumulate,
            events.ClearParity: self._clear, events.FinishParity: self._finish, events.Grant: self._granted,
            events.Commit: self._committed, events.BeginEpoch: self._begin, events.FollowOrders: self._follow,
            events.StartDecode: lambda slot, effect, _: self._decode(slot, effect.order),
            events.SendPart: self._send_part,
        }  # fmt: skip
        for slot in range(self.slots):
            self.dispatch(slot, events.Configured(self._geometry(slot)))
            self._connect(slot, above=True)

    def _geometry(self, slot: int) -> Geometry:
        return Geometry(LAYOUT, (self.topology.group_of(slot).data,), 1)

    def _connect(self, slot: int, *, above: bool = False) -> None:
        """Connect a slot with its near agents; with `above`, with the later ones alone."""
        for other in self.members[slot].state.near:
            if other > slot or not above:
                self.dispatch(slot, events.PeerConnected(other, self.members[other].state.incarnation))
                self.dispatch(other, events.PeerConnected(slot, self.members[slot].state.incarnation))

    # ---- the protocol

    def dispatch(self, slot: int, event: Any, extra: Any = None) -> None:
        member = self.members[slot]
        before = member.state
        member.state, effects = step(before, event)
        self.answered += member.state.restorable - before.restorable
        self.whole += _whole(member.state) - _whole(before)
        for effect in effects:
            handle = self.effects.get(type(effect))
            if handle is not None:
                handle(slot, effect, extra)

    def send(self, slot: int, to: int, message: Any, payload: int = 0) -> None:
        """Send a message, or handle one to oneself."""
        sender = self.members[slot]
        if to == slot:
            self._arrive(slot, slot, sender.state.incarnation, message)
            return
        self.sent[type(message).__name__] += 1
        self.peers[slot].add(to)
        self.peers[to].add(slot)
        size = self._size(message) + FRAME + payload
        self.wires.bytes += size
        incarnation, receiver = sender.state.incarnation, self.members[to]

        def arrived() -> None:
            if self.members[to] is receiver and self.members[slot] is sender:
                self._arrive(to, slot, incarnation, message)

        self.wires.carry(f"{slot}", f"{to}", size, arrived)

    def _size(self, message: Any) -> int:
        """Return the bytes of a message. A choice is encoded once: it is as long as the job has members."""
        if not isinstance(message, messages.Decision):
            return len(messages.encode(message))
        if id(message) not in self._sizes:
            self._sizes[id(message)] = message, len(messages.encode(message))
        return self._sizes[id(message)][1]

    def _arrive(self, slot: int, sender: int, incarnation: int, message: Any) -> None:
        if isinstance(message, messages.Bucket):
            self.dispatch(slot, events.BucketArrived(sender, incarnation, message, True), message.sum)
        elif isinstance(message, messages.Part):
            self._part(slot, message)
        elif isinstance(message, messages.Inventory):
            self._inventory(slot, message)
        elif isinstance(message, messages.Decision):
            self.timeline.after(FOLDER_S, lambda: self._read(slot, message.epoch))
        elif isinstance(message, messages.Fetch) and self.members[slot].state.planned_epoch < message.epoch:
            self.timeline.after(FOLDER_S, lambda: self._put_off(slot, sender, incarnation, message))
        else:
            self.dispatch(slot, events.Received(sender, incarnation, message))

    def _put_off(self, slot: int, sender: int, incarnation: int, message: messages.Fetch) -> None:
        """Read the choice that a peer acts upon already, then do what it asks."""
        self._read(slot, message.epoch)
        self.dispatch(slot, events.Received(sender, incarnation, message))

    # ---- coding

    def _later(self, slot: int, seconds: float, make: Callable[[], Any]) -> None:
        member = self.members[slot]

        def act() -> None:
            if self.members[slot] is member:
                self.dispatch(slot, make())

        self.timeline.after(seconds, act)

    def _send_chunk(self, slot: int, effect: Any, _: Any) -> None:
        sums = effect.sums
        for index in range(effect.start, len(sums)):
            bucket = messages.Bucket(
                snapshot=effect.snapshot, stripe=effect.stripe, index=index, sum=sums[index], size=BUCKET
            )
            self.send(slot, effect.to, bucket, BUCKET)
        end = messages.ChunkEnd(
            snapshot=effect.snapshot, stripe=effect.stripe, count=len(sums), digest=digest(sums)
        )  # fmt: skip
        self.send(slot, effect.to, end)

    def _verify(self, slot: int, effect: Any, _: Any) -> None:
        self._later(slot, WORK_S, lambda: events.DataVerified(effect.snapshot))

    def _clear(self, slot: int, effect: Any, _: Any) -> None:
        self.members[slot].parity[effect.snapshot, effect.stripe] = set()

    def _accumulate(self, slot: int, effect: Any, sum_: Any) -> None:
        self.members[slot].parity[effect.snapshot, effect.stripe].add(sum_)

    def _finish(self, slot: int, effect: Any, _: Any) -> None:
        value = digest(sorted(self.members[slot].parity[effect.snapshot, effect.stripe]))
        self._later(slot, WORK_S, lambda: events.ParityVerified(effect.snapshot, effect.stripe, value))

    # ---- workers

    def offer(self, snapshot: SnapshotId) -> None:
        """Have the workers of all members ask for a buffer."""
        self.offered[snapshot] = self.timeline.now
        for slot in range(self.slots):
            self._later(slot, LOCAL_S, lambda: events.WorkerOpened(0, snapshot))

    def _granted(self, slot: int, effect: Any, _: Any) -> None:
        (buckets,) = self._geometry(slot).parts
        sums = tuple(_sum(effect.snapshot, slot, bucket) for bucket in range(buckets))
        self._later(slot, WRITE_S, lambda: events.WorkerSealed(0, effect.snapshot, sums))

    def _committed(self, slot: int, effect: Any, _: Any) -> None:
        since = self.timeline.now - self.offered[effect.snapshot]
        self.commits.setdefault(effect.snapshot, {}).setdefault(slot, since)  # a restored one commits once more

    def committed(self, snapshot: SnapshotId) -> bool:
        return len(self.commits.get(snapshot, ())) == self.slots

    # ---- elections

    def advance(self, epoch: int) -> None:
        """Have the supervisors of all members begin an epoch."""
        self._inventories.clear()
        for slot in range(self.slots):
            self.dispatch(slot, events.EpochAdvanced(epoch))

    def _begin(self, slot: int, effect: Any, _: Any) -> None:
        state = self.members[slot].state
        request = messages.InventoryRequest(epoch=effect.epoch)
        for other in range(self.slots) if slot == 0 else {*state.near, 0}:
            self.send(slot, other, request)

    def _inventory(self, slot: int, inventory: messages.Inventory) -> None:
        epoch = self.members[slot].state.epoch
        if slot != 0 or inventory.epoch != epoch or epoch in self._plans:
            return
        self._inventories[inventory.slot] = inventory
        if len(self._inventories) == self.slots:
            self._choose(epoch)

    def _choose(self, epoch: int) -> None:
        found, groups = self._inventories, self.topology.groups
        answer = restore_choice.choose(found, groups, range(self.slots), False)
        assert not isinstance(answer, restore_choice.Wait)
        snapshot = getattr(answer, "snapshot", None)
        decision = messages.Decision(
            epoch=epoch, snapshot=snapshot, incarnations=tuple(found[slot].incarnation for slot in range(self.slots))
        )
        orders = restore_choice.plan(found, groups, snapshot, epoch, range(self.slots)) if snapshot is not None else ()
        self._plans[epoch] = decision, orders
        for slot in range(self.slots):
            self.send(0, slot, decision)

    def _read(self, slot: int, epoch: int) -> None:
        self.dispatch(slot, events.PlanRead(*self._plans[epoch]))

    def settled(self, snapshot: SnapshotId) -> bool:
        """Return whether all members know that a snapshot that was restored is whole again."""
        return all(member.state.committed == snapshot for member in self.members)

    # ---- losing and rebuilding

    def replace(self, slot: int) -> None:
        """Put an empty member into the place of one whose node is gone."""
        near = self.members[slot].state.near
        for other in near:
            self.dispatch(other, events.PeerLost(slot))
        gone = self.members[slot].state
        self.answered -= gone.restorable
        self.whole -= _whole(gone)
        self._incarnations += 1
        self.members[slot] = Member(slot, self._incarnations, self.topology)
        self.dispatch(slot, events.Configured(self._geometry(slot)))
        self._connect(slot)

    def _follow(self, slot: int, effect: Any, _: Any) -> None:
        for decoder, order in effect.orders:
            if slot in order.targets:
                self.members[slot].orders[order.snapshot, order.stripe] = order
            if decoder == slot:
                self._decode(slot, order)

    def _decode(self, slot: int, order: messages.Decode) -> None:
        member, key = self.members[slot], (order.snapshot, order.stripe)
        member.orders[key], member.gathered[key] = order, {slot}
        for source in order.sources:
            if source != slot:
                fetch = messages.Fetch(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe)
                self.send(slot, source, fetch)

    def _send_part(self, slot: int, effect: Any, _: Any) -> None:
        copy = self.members[slot].state.copy(effect.snapshot)
        assert copy is not None
        self._send(slot, effect.to, slot, copy.good[effect.stripe], effect.snapshot)

    def _send(self, slot: int, to: int, owner: int, record: ChunkRecord, snapshot: SnapshotId) -> None:
        part = messages.Part(
            epoch=self.members[slot].state.epoch, snapshot=snapshot, stripe=record.stripe, owner=owner, index=0,
            count=record.count, sum=record.digest, size=BUCKET, digest=record.digest,
        )  # fmt: skip
        self.send(slot, to, part, BUCKET)

    def _part(self, slot: int, part: messages.Part) -> None:
        """Take a chunk: one that is decoded from, or one that is back."""
        member, key = self.members[slot], (part.snapshot, part.stripe)
        order = member.orders.get(key)
        if order is None or part.epoch != order.epoch:
            return
        if part.owner == slot:
            self.dispatch(slot, self._rebuilt(slot, order))
            return
        member.gathered[key].add(part.owner)
        if member.gathered[key] >= set(order.sources):
            del member.gathered[key]
            for target in order.targets:
                self._send(slot, target, target, self._rebuilt(slot, order, target).record, order.snapshot)

    def _rebuilt(self, slot: int, order: messages.Decode, target: int | None = None) -> events.ChunkRebuilt:
        """Return the chunk of a stripe as it was written, which is what right chunks decode to."""
        owner = slot if target is None else target
        group = self.topology.group_of(owner)
        sources = group.sources(order.stripe)
        sums = {
            each: (_sum(order.snapshot, each, group.data_stripes(each).index(order.stripe)),) for each in sources
        }  # fmt: skip
        assert order.digests == tuple(digest(sums[each]) for each in sources)
        if owner in sources:
            record = ChunkRecord(order.stripe, digest(sums[owner]), (), 1)
            return events.ChunkRebuilt(order.snapshot, record, sums[owner])
        parity = (digest(sorted(sum_ for each in sources for sum_ in sums[each])),)
        record = ChunkRecord(order.stripe, parity[0], order.digests, 1, order.counts)
        return events.ChunkRebuilt(order.snapshot, record, parity)
