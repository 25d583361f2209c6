"""A cluster of protocol states over a network that loses, repeats, reorders and damages, with real bytes and coding.

What a run may promise is kept beside it: which snapshots every member has stored, and which chunks were lost since.
The newest such snapshot stays on every member until a newer one is stored by all, or until workers have gone on from a
choice that could not restore it. `recover` restores from the agents' memory alone and compares with what the workers
wrote; chunks are rebuilt afterwards, one by one, and anything may happen in between.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.protocol import events as ev
from keepwarm.ft.protocol import messages as msg
from keepwarm.ft.protocol import restore_choice
from keepwarm.ft.protocol import step as protocol
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.protocol.state import Geometry, Mode, State, Topology, initial

BUCKET = 4
LAYOUT = "layout"


class Broken(AssertionError):
    """The run promised something that memory does not hold."""


@dataclass
class Packet:
    sender: int
    incarnation: int
    to: int
    message: Any
    payload: bytes = b""


@dataclass
class Node:
    state: State
    data: list[bytearray]
    parity: list[bytearray]
    work: list[Any] = field(default_factory=list)
    granted: dict[int, ev.Grant] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    step: dict[int, int] = field(default_factory=dict)


class Cluster:
    """`sizes` and `m` give the groups; every node has two workers."""

    def __init__(self, sizes: tuple[int, ...], m: int, *, durable: bool = False, chunk: int = 2) -> None:
        slots = iter(range(sum(sizes)))
        # Members are interleaved so that a group's slots are not neighbours in the tree.
        order = sorted(slots, key=lambda slot: (slot % len(sizes), slot))
        groups, start = [], 0
        for index, size in enumerate(sizes):
            groups.append(StripeGroup(index, tuple(sorted(order[start : start + size])), m))
            start += size
        self.topology, self.m, self.third, self.chunk = Topology(tuple(groups)), m, durable, chunk
        self.epoch, self.incarnations = 0, [0] * self.topology.slots
        self.packets: list[Packet] = []
        self.stored: dict[msg.SnapshotId, set[int]] = {}
        self.lost: dict[msg.SnapshotId, set[tuple[int, int]]] = {}
        self.promised: set[msg.SnapshotId] = set()
        self.orders: list[tuple[int, msg.Decode]] = []
        self.chosen: msg.SnapshotId | None = None
        self.wanted = False
        self.committed = 0
        self.history: list[str] = []
        self.reading: dict[int, tuple[msg.SnapshotId, int, int, bytes]] = {}
        self.rots = [0] * self.topology.slots
        self.nodes = [self._born(slot) for slot in range(self.topology.slots)]
        self.recover(())

    # ---- what the workers hold, and what nodes are made of

    def geometry(self, slot: int) -> Geometry:
        """Two workers; nodes of unequal state, the largest of which fills its buffer."""
        buckets = self.topology.group_of(slot).data * self.chunk
        first = (buckets + 1) // 2
        return Geometry(LAYOUT, (first, max(0, buckets - first - slot % 2)), self.chunk)

    def content(self, slot: int, snapshot: msg.SnapshotId) -> bytes:
        size = sum(self.geometry(slot).parts) * BUCKET
        seed = f"{slot} {snapshot.epoch} {snapshot.step}".encode()
        whole = self.topology.group_of(slot).data * self.chunk * BUCKET
        return hashlib.shake_128(seed).digest(size).ljust(whole, b"\0")

    def _born(self, slot: int) -> Node:
        self.incarnations[slot] += 1
        group = self.topology.group_of(slot)
        state = initial("run", slot, self.incarnations[slot], self.topology, durable=self.third)
        state, _ = protocol.step(state, ev.Configured(self.geometry(slot)))
        chunk = self.chunk * BUCKET
        data = [bytearray(group.data * chunk) for _ in range(state.data_buffers)]
        return Node(state, data, [bytearray(group.parity * chunk) for _ in range(state.parity_buffers)])

    # ---- events and effects

    def dispatch(self, slot: int, event: ev.Event, payload: bytes = b"") -> None:
        node = self.nodes[slot]
        before = node.state
        node.state, effects = protocol.step(before, event)
        if node.state.mode is Mode.ACTIVE:
            for copy in node.state.copies:
                if slot in copy.members and slot not in self.stored.setdefault(copy.snapshot, set()):
                    self._stored(slot, copy.snapshot)
        if node.state.resumed and not before.resumed:
            self._resumed()
        self._check_kept(slot, before, node.state)
        for effect in effects:
            self._carry_out(slot, effect, payload)
        self.check_buffers(node.state)

    def _resumed(self) -> None:
        """Workers have completed a step from the choice: what it could not restore is given up now."""
        age = self.chosen.age if self.chosen is not None else (-1, -1)
        self.promised = {each for each in self.promised if each.age <= age or each.epoch == self.epoch}

    def _check_kept(self, slot: int, before: State, after: State) -> None:
        """The newest snapshot that all members stored stays where it is, even if a newer one is chosen."""
        newest = max(self.promised, key=lambda each: each.age, default=None)
        if newest is None:
            return
        had, has = before.copy(newest), after.copy(newest)
        if had is not None and had.candidate and had.good and (has is None or not has.candidate):
            raise Broken(f"slot {slot} gives up {newest}, and nothing newer is stored by all")

    def _stored(self, slot: int, snapshot: msg.SnapshotId) -> None:
        """A member says Stored: what it holds must be what the workers of its group wrote, coded."""
        if not any(where == slot for where, _ in self.lost.get(snapshot, set())):
            for stripe in range(self._width(slot)):
                found = self.chunk_view(slot, snapshot, stripe).tobytes()
                if found != self._expected(slot, snapshot, stripe):
                    raise Broken(f"slot {slot} says Stored {snapshot} and stripe {stripe} is wrong")
        self.stored[snapshot].add(slot)
        if len(self.stored[snapshot]) == self.topology.slots:
            self.promised.add(snapshot)
            if snapshot == self.chosen:
                self.promised = {each for each in self.promised if each.age >= snapshot.age}

    def _expected(self, slot: int, snapshot: msg.SnapshotId, stripe: int) -> bytes:
        group, size = self.topology.group_of(slot), self.chunk * BUCKET
        data = []
        for source in group.sources(stripe):
            place = group.data_stripes(source).index(stripe) * size
            data.append(self.content(source, snapshot)[place : place + size])
        if slot in group.sources(stripe):
            return data[group.sources(stripe).index(slot)]
        parity = bytearray(size)
        for column, chunk in enumerate(data):
            codec(group).row(group.parities(stripe).index(slot)).accumulate(parity, column, chunk)
        return bytes(parity)

    def check_buffers(self, state: State) -> None:
        for kind in ("data", "parity"):
            used = [getattr(copy, kind) for copy in state.copies if getattr(copy, kind) is not None]
            if len(used) != len(set(used)):
                raise Broken(f"two snapshots share a {kind} buffer: {state.copies}")

    def _carry_out(self, slot: int, effect: ev.Effect, payload: bytes) -> None:
        node = self.nodes[slot]
        match effect:
            case ev.Send(to, message):
                self._send(slot, to, message)
            case ev.SendChunk(to, snapshot, stripe, start, data, first, sums):
                for index in range(start, len(sums)):
                    at = (first + index) * BUCKET
                    header = msg.Bucket(snapshot=snapshot, stripe=stripe, index=index, sum=sums[index], size=BUCKET)
                    self._send(slot, to, header, bytes(node.data[data][at : at + BUCKET]))
                end = msg.ChunkEnd(snapshot=snapshot, stripe=stripe, count=len(sums), digest=msg.digest(sums))
                self._send(slot, to, end)
            case ev.Verify() | ev.FinishParity():
                node.work.append(effect)
            case ev.StopCoding(snapshot):
                node.work = [work for work in node.work if work.snapshot != snapshot]
            case ev.ClearParity(_, stripe, parity):
                view = self._parity(slot, stripe, parity)
                view[:] = bytes(len(view))
            case ev.Accumulate(_, stripe, _, column, index, parity):
                self._accumulate(slot, stripe, column, index, parity, payload)
            case ev.Grant(worker):
                node.granted[worker] = effect
                node.waiting.discard(worker)
            case ev.Refuse(worker, _, reason):
                node.waiting.discard(worker)
                if reason not in (ev.Reason.RECOVERING, ev.Reason.EPOCH):
                    node.step[worker] = node.step.get(worker, 0) + 1
            case ev.Revoke(worker, snapshot):
                node.work.append(effect)
            case ev.Commit(snapshot):
                self.committed += 1
                # From now on an agent may have given up the older ones.
                self.promised = {each for each in self.promised if each.age >= snapshot.age}
                if snapshot not in self.promised:
                    raise Broken(f"slot {slot} commits {snapshot} before all groups are prepared")
            case ev.Log("error", text) if "defect" in text:
                raise Broken(text)
            case ev.StartDecode(order):
                self.orders.append((slot, order))
            case ev.RequestEpoch():
                self.wanted = True

    def _send(self, slot: int, to: int, message: Any, payload: bytes = b"") -> None:
        wire = msg.decode_agent(msg.encode(message))
        self.packets.append(Packet(slot, self.incarnations[slot], to, wire, payload))

    def _parity(self, slot: int, stripe: int, parity: int) -> memoryview:
        place = self.topology.group_of(slot).parity_stripes(slot).index(stripe)
        size = self.chunk * BUCKET
        return memoryview(self.nodes[slot].parity[parity])[place * size : (place + 1) * size]

    def _data(self, slot: int, stripe: int, data: int) -> memoryview:
        place = self.topology.group_of(slot).data_stripes(slot).index(stripe)
        size = self.chunk * BUCKET
        return memoryview(self.nodes[slot].data[data])[place * size : (place + 1) * size]

    def _accumulate(self, slot: int, stripe: int, column: int, index: int, parity: int, payload: bytes) -> None:
        group = self.topology.group_of(slot)
        row = codec(group).row(group.parities(stripe).index(slot))
        target = self._parity(slot, stripe, parity)[index * BUCKET : (index + 1) * BUCKET]
        row.accumulate(target, column, payload)

    def offer(self, slot: int, worker: int, wait: bool) -> None:
        node = self.nodes[slot]
        if worker in node.dead or worker in node.waiting or worker in node.granted:
            return
        step = node.step.get(worker, 0)
        if step > min(other.step.get(w, 0) for other in self.nodes for w in range(2)) + 1:
            return
        node.waiting.add(worker)
        snapshot = msg.SnapshotId("run", self.epoch, step, LAYOUT)
        self.dispatch(slot, ev.WorkerOpened(worker, snapshot, wait))

    def write(self, slot: int, worker: int, cancel: bool = False) -> None:
        node = self.nodes[slot]
        grant = node.granted.pop(worker, None)
        if grant is None:
            return
        node.step[worker] = grant.snapshot.step + 1
        if cancel:
            self.dispatch(slot, ev.WorkerCancelled(worker, grant.snapshot))
            return
        start = grant.first * BUCKET
        size = self.geometry(slot).parts[worker] * BUCKET
        part = self.content(slot, grant.snapshot)[start : start + size]
        node.data[grant.buffer][start : start + size] = part
        sums = tuple(xxhash.xxh3_64_intdigest(part[i : i + BUCKET]) for i in range(0, size, BUCKET))
        self.dispatch(slot, ev.WorkerSealed(worker, grant.snapshot, sums))

    def kill_worker(self, slot: int, worker: int) -> None:
        """It dies in the middle of its copy: half of its part is overwritten."""
        node = self.nodes[slot]
        grant = node.granted.pop(worker, None)
        if grant is not None and self.geometry(slot).parts[worker]:
            node.data[grant.buffer][grant.first * BUCKET : grant.first * BUCKET + 2] = b"??"
        node.dead.add(worker)
        node.waiting.discard(worker)
        self.dispatch(slot, ev.WorkerLost(worker))

    def deliver(self, place: int, *, keep: bool = False, damage: bool = False) -> None:
        if not self.packets:
            return
        place %= len(self.packets)
        packet = self.packets[place] if keep else self.packets.pop(place)
        message, payload = packet.message, packet.payload
        if isinstance(message, msg.Bucket):
            if damage:
                payload = bytes([payload[0] ^ 1]) + payload[1:]
            intact = xxhash.xxh3_64_intdigest(payload) == message.sum
            event: ev.Event = ev.BucketArrived(packet.sender, packet.incarnation, message, intact)
        else:
            event = ev.Received(packet.sender, packet.incarnation, message)
        self.dispatch(packet.to, event, payload)

    def drop_packet(self, place: int) -> None:
        if self.packets:
            self.packets.pop(place % len(self.packets))

    def work(self, slot: int, place: int = 0) -> None:
        node = self.nodes[slot]
        if not node.work:
            return
        match node.work.pop(place % len(node.work)):
            case ev.Verify(snapshot, data, sums):
                found = [bytes(node.data[data][i * BUCKET : (i + 1) * BUCKET]) for i in range(len(sums))]
                bad = tuple(i for i, b in enumerate(found) if xxhash.xxh3_64_intdigest(b) != sums[i])
                self.dispatch(slot, ev.DataVerified(snapshot, bad))
            case ev.FinishParity(snapshot, stripe, parity):
                view = self._parity(slot, stripe, parity)
                self.dispatch(slot, ev.ParityVerified(snapshot, stripe, msg.digest(sums_of(view, self.chunk))))
            case ev.Revoke(worker, snapshot):
                grant = node.granted.get(worker)
                if grant is not None and grant.snapshot == snapshot:
                    self.write(slot, worker, cancel=True)

    def reconnect(self, one: int, other: int) -> None:
        """The link breaks, what is under way is lost, and it comes back."""
        if one == other:
            return
        self.packets = [p for p in self.packets if {p.sender, p.to} != {one, other}]
        for slot, peer in ((one, other), (other, one)):
            self.dispatch(slot, ev.PeerLost(peer))
        for slot, peer in ((one, other), (other, one)):
            self.dispatch(slot, ev.PeerConnected(peer, self.incarnations[peer]))

    def away(self, slot: int, peer: int) -> None:
        """An agent has not heard of another one for long."""
        if slot != peer:
            self.dispatch(slot, ev.PeerLost(peer))
            self.dispatch(slot, ev.PeerAway(peer))

    def crash(self, slot: int) -> None:
        """The agent dies with its memory; an empty one starts. What it sent may still be under way."""
        for snapshot in self.stored:
            self._lose(snapshot, slot, range(self.topology.group_of(slot).size))
        step, dead = self.nodes[slot].step, self.nodes[slot].dead
        self.nodes[slot] = self._born(slot)
        self.nodes[slot].step, self.nodes[slot].dead = step, dead

    def rot(self, slot: int, place: int, byte: int) -> None:
        """A byte of a good chunk changes in memory."""
        node = self.nodes[slot]
        chunks = [(copy, stripe) for copy in node.state.copies for stripe in copy.good if copy.good[stripe].count]
        if not chunks:
            return
        copy, stripe = chunks[place % len(chunks)]
        view = self.chunk_view(slot, copy.snapshot, stripe)
        self.rots[slot] += 1
        view[byte % (copy.good[stripe].count * BUCKET)] ^= 0x55
        self._lose(copy.snapshot, slot, (stripe,))

    def _lose(self, snapshot: msg.SnapshotId, slot: int, stripes: Any) -> None:
        self.lost.setdefault(snapshot, set()).update((slot, stripe) for stripe in stripes)

    def chunk_view(self, slot: int, snapshot: msg.SnapshotId, stripe: int) -> memoryview:
        copy = self.nodes[slot].state.copy(snapshot)
        assert copy is not None
        if slot in self.topology.group_of(slot).parities(stripe):
            assert copy.parity is not None
            return self._parity(slot, stripe, copy.parity)
        assert copy.data is not None
        return self._data(slot, stripe, copy.data)

    def scrub(self, slot: int) -> None:
        for copy in self.nodes[slot].state.copies:
            for stripe, record in copy.good.items():
                if self.nodes[slot].state.copy(copy.snapshot) is None:
                    break
                found = msg.digest(sums_of(self.chunk_view(slot, copy.snapshot, stripe), record.count))
                self.dispatch(slot, ev.Scrubbed(copy.snapshot, stripe, found == record.digest))

    def durable(self, slot: int) -> None:
        """The disk begins with the newest committed snapshot, or ends with the one it has; it reads what it began."""
        state = self.nodes[slot].state
        held = next((copy for copy in state.copies if copy.held), None)
        committed = next((copy for copy in reversed(state.copies) if copy.committed), None)
        if held is None and committed is not None and len(committed.good) == committed.group.size:
            self.dispatch(slot, ev.DurableStarted(committed.snapshot))
            began = self.nodes[slot].state.copy(committed.snapshot)
            if began is not None and began.held and began.data is not None:
                bytes_ = bytes(self.nodes[slot].data[began.data])
                self.reading[slot] = (committed.snapshot, self.incarnations[slot], self.rots[slot], bytes_)
        elif held is not None and held.data is not None:
            started, *since, bytes_ = self.reading[slot]
            found = bytes(self.nodes[slot].data[held.data])
            if since == [self.incarnations[slot], self.rots[slot]] and found != bytes_:
                raise Broken(f"{started}: slot {slot} changed while the disk read it")
            self.dispatch(slot, ev.DurableEnded(started))

    def drain(self, limit: int = 20_000) -> None:
        """Everything under way arrives in order, all computing is done, until nothing is left."""
        for _ in range(limit):
            if busy := [slot for slot, node in enumerate(self.nodes) if node.work]:
                self.work(busy[0])
            elif self.packets:
                self.deliver(0)
            elif self.orders:
                self.rebuild(0)
            else:
                return
        raise Broken("messages never end")

    def round(self) -> None:
        """All workers take one snapshot, without faults."""
        for slot in range(self.topology.slots):
            for worker in range(2):
                self.offer(slot, worker, wait=True)
        self.drain()
        for slot in range(self.topology.slots):
            for worker in range(2):
                self.write(slot, worker)
        self.drain()

    # ---- recovery

    def recover(self, late: tuple[int, ...]) -> msg.SnapshotId | None:
        """A new epoch without the agents `late`; all workers are new afterwards. Raises `Broken`."""
        self.epoch += 1
        self.orders, self.wanted = [], False
        here = [slot for slot in range(self.topology.slots) if slot not in late]
        inventories = {}
        for slot in here:
            node = self.nodes[slot]
            self.dispatch(slot, ev.EpochAdvanced(self.epoch))
            for worker in range(2):
                grant = node.granted.pop(worker, None)
                self.dispatch(slot, ev.WorkerLost(worker))
                if grant is not None and self.geometry(slot).parts[worker]:
                    node.data[grant.buffer][grant.first * BUCKET] ^= 0xFF
            node.dead, node.waiting, node.work = set(), set(), []
            self.scrub(slot)
            inventories[slot] = protocol.inventory(node.state)
        expected = range(self.topology.slots)
        answer = restore_choice.choose(inventories, self.topology.groups, expected, deadline_passed=True)
        if isinstance(answer, restore_choice.Wait):
            self.history.append(f"epoch {self.epoch}: {answer}")
            return None
        early = restore_choice.choose(inventories, self.topology.groups, expected, deadline_passed=False)
        alike = early == answer or (
            isinstance(early, restore_choice.FallBack) and isinstance(answer, restore_choice.FallBack)
        )
        if not isinstance(early, restore_choice.Wait) and not alike:
            raise Broken(f"did not wait for {late} and took {early}, not {answer}")
        chosen = answer.snapshot if isinstance(answer, restore_choice.Choice) else None
        self.history.append(f"epoch {self.epoch}: {answer}")
        self._check_choice(chosen, late)
        if chosen is not None:
            self._check_bytes(chosen, inventories)
        self._decide(chosen, here, inventories)
        return chosen

    def _check_choice(self, chosen: msg.SnapshotId | None, late: tuple[int, ...]) -> None:
        for snapshot in sorted(self.promised, key=lambda each: each.age):
            away = {(slot, stripe) for slot in late for stripe in range(self.topology.group_of(slot).size)}
            gone = self.lost.get(snapshot, set()) | away
            bearable = all(
                sum((slot, stripe) in gone for slot in group.members) <= group.parity
                for group in self.topology.groups
                for stripe in range(group.size)
            )
            if bearable and (chosen is None or chosen.age < snapshot.age):
                raise Broken(f"restored {chosen}, although {snapshot} was prepared everywhere")

    def _check_bytes(self, chosen: msg.SnapshotId, inventories: dict[int, msg.Inventory]) -> None:
        for group in self.topology.groups:
            for stripe in range(group.size):
                holders = restore_choice.stripe_state(inventories, group, chosen, stripe).holders
                chunks = self._decoded(group, chosen, stripe, holders[: group.data])
                for column, slot in enumerate(group.sources(stripe)):
                    place = group.data_stripes(slot).index(stripe) * self.chunk * BUCKET
                    want = self.content(slot, chosen)[place : place + self.chunk * BUCKET]
                    if chunks[column].tobytes() != want:
                        raise Broken(f"{chosen}: slot {slot} stripe {stripe} is not what its workers wrote")

    def _decoded(
        self, group: StripeGroup, snapshot: msg.SnapshotId, stripe: int, sources: tuple[int, ...]
    ) -> list["np.ndarray[Any, np.dtype[np.uint8]]"]:
        """All k + m chunks of a stripe from the memory of k holders, by column and row."""
        order = (*group.sources(stripe), *group.parities(stripe))
        known = {order.index(slot): self._full(slot, snapshot, stripe) for slot in sources}
        missing = {i: np.zeros(self.chunk * BUCKET, np.uint8) for i in range(group.size) if i not in known}
        codec(group).decode(known, missing)
        return [known.get(i, missing.get(i)) for i in range(group.size)]  # type: ignore[misc]

    def _full(self, slot: int, snapshot: msg.SnapshotId, stripe: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        copy = self.nodes[slot].state.copy(snapshot)
        assert copy is not None
        chunk = np.frombuffer(bytes(self.chunk_view(slot, snapshot, stripe)), np.uint8).copy()
        chunk[copy.good[stripe].count * BUCKET :] = 0
        return chunk

    def _decide(self, chosen: msg.SnapshotId | None, here: list[int], inventories: dict[int, msg.Inventory]) -> None:
        incarnations = tuple(self.incarnations[slot] if slot in here else 0 for slot in range(self.topology.slots))
        decision = msg.Decision(epoch=self.epoch, snapshot=chosen, incarnations=incarnations)
        self.chosen = chosen
        if chosen is not None:
            self.stored[chosen] = set()
        for slot in here:
            self.dispatch(slot, ev.Received(slot, self.incarnations[slot], decision))
            self.nodes[slot].step = dict.fromkeys(range(2), chosen.step + 1 if chosen else 0)
        for slot in here:
            for peer in here:
                if peer != slot:
                    self.dispatch(slot, ev.PeerConnected(peer, self.incarnations[peer]))
        if chosen is not None:
            self.orders += restore_choice.plan(inventories, self.topology.groups, chosen, self.epoch, here)
            rebuilt = {(target, order.stripe) for _, order in self.orders for target in order.targets}
            for slot in here:
                missing = set(range(self._width(slot))) - self.nodes[slot].state.copy(chosen).good.keys()  # type: ignore[union-attr]
                if not {(slot, stripe) for stripe in missing} <= rebuilt:
                    raise Broken(f"nobody rebuilds {chosen} on slot {slot}")

    def _width(self, slot: int) -> int:
        return self.topology.group_of(slot).size

    def rebuild(self, place: int) -> None:
        """One stripe is rebuilt for its targets, from chunks that are still what they were when it was ordered."""
        if not self.orders:
            return
        decoder, order = self.orders.pop(place % len(self.orders))
        group = self.topology.group_of(decoder)
        for source in order.sources:
            copy = self.nodes[source].state.copy(order.snapshot)
            if copy is not None and order.stripe in copy.good:
                record = copy.good[order.stripe]
                found = sums_of(self.chunk_view(source, order.snapshot, order.stripe), record.count)
                if msg.digest(found) == record.digest:
                    continue
                self.dispatch(source, ev.Scrubbed(order.snapshot, order.stripe, False))
            self.dispatch(decoder, ev.EpochNeeded(order.epoch, f"slot {source} lost stripe {order.stripe}"))
            return
        chunks = self._decoded(group, order.snapshot, order.stripe, order.sources)
        counts = (*order.counts, *(self.chunk for _ in range(group.parity)))
        slots = (*group.sources(order.stripe), *group.parities(order.stripe))
        for column, digest in enumerate(order.digests):
            if msg.digest(sums_of(chunks[column], order.counts[column])) != digest:
                return
        for target in order.targets:
            copy = self.nodes[target].state.copy(order.snapshot)
            if copy is None or not copy.committed or order.epoch != self.nodes[target].state.epoch:
                continue
            place = slots.index(target)
            view = self.chunk_view(target, order.snapshot, order.stripe)
            view[:] = chunks[place].tobytes()
            sums = sums_of(view, counts[place])
            record = msg.ChunkRecord(order.stripe, msg.digest(sums), (), counts[place])
            if place >= group.data:
                record = msg.ChunkRecord(order.stripe, msg.digest(sums), order.digests, counts[place], order.counts)
            self.dispatch(target, ev.ChunkRebuilt(order.snapshot, record, sums if place < group.data else ()))
            self.lost.get(order.snapshot, set()).discard((target, order.stripe))


def sums_of(view: Any, count: int) -> tuple[int, ...]:
    raw = bytes(view)
    return tuple(xxhash.xxh3_64_intdigest(raw[i * BUCKET : (i + 1) * BUCKET]) for i in range(count))


_codecs: dict[tuple[int, int], Codec] = {}


def codec(group: StripeGroup) -> Codec:
    key = (group.data, group.parity)
    if key not in _codecs:
        _codecs[key] = Codec(*key, kernel="numpy")
    return _codecs[key]
