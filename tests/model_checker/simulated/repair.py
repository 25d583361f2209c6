"""How an agent rebuilds chunks: gather k of a stripe, decode, check, and hand the result to its owner."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from tests.model_checker import port
from tests.model_checker.port import ChunkRecord, Decode, SnapshotId, digest, events, messages
from tests.model_checker.simulated.content import Age, Bytes, Chunk, checksum, decode
from tests.model_checker.simulated.memory import digest_of

if TYPE_CHECKING:
    from tests.model_checker.simulated.node import Node

Key = tuple[Age, int]


class Part:
    """The header of a whole chunk on its way: that of `owner`, as a source of a decoding or as its result."""

    def __init__(self, epoch: int, snapshot: SnapshotId, stripe: int, owner: int, sums: tuple[int, ...]) -> None:
        self.epoch, self.snapshot, self.stripe, self.owner, self.sums = epoch, snapshot, stripe, owner, sums

    def __str__(self) -> str:
        return f"part of {self.snapshot}, stripe {self.stripe}, owner {self.owner}"


class Decoding:
    """One stripe that this agent decodes, and the chunks that it has gathered.

    If k of them do not decode to what was written, others are tried: a wrong chunk of parity matches its own digest.
    """

    def __init__(self, order: Decode) -> None:
        self.order, self.targets = order, set(order.targets)
        self.using: tuple[int, ...] = order.sources
        self.holders = (*order.sources, *port.spares(order))
        self.chunks: dict[int, Chunk] = {}
        self.lost: set[int] = set()
        self.failed: set[tuple[int, ...]] = set()
        self.solving = False

    def try_others(self) -> bool:
        """Use k other holders. Return whether there are any."""
        here = [slot for slot in self.holders if slot not in self.lost]
        for using in itertools.combinations(here, len(self.order.sources)):
            if using not in self.failed:
                self.using = using
                return True
        return False


class Repair:
    """Decodings of one agent, and chunks that it expects from others."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.decodings: dict[Key, Decoding] = {}
        self.fillings: dict[Key, tuple[Decode, int]] = {}
        """(order, decoder) of the chunks that this agent expects."""

    @property
    def idle(self) -> bool:
        return not self.decodings and not self.fillings

    @property
    def awaited(self) -> set[int]:
        """Return the slots without which this epoch's repairs cannot end."""
        found = {decoder for _, decoder in self.fillings.values()}
        for decoding in self.decodings.values():
            if self.node.slot not in decoding.order.targets:
                found |= set(decoding.using) - decoding.chunks.keys()
        return found - {self.node.slot}

    def begin_epoch(self) -> None:
        self.decodings.clear()
        self.fillings.clear()

    def follow(self, orders: Any) -> None:
        mine = self.node.slot
        for decoder, order in orders:
            if decoder != mine and mine in order.targets:
                self.fillings[order.snapshot.age, order.stripe] = order, decoder
        for decoder, order in orders:
            if decoder == mine:
                self.decode(order)

    def retry(self) -> None:
        """Ask again for everything that has not come."""
        for decoding in list(self.decodings.values()):
            self._fetch(decoding)
        for order, decoder in list(self.fillings.values()):
            self._ask(order, decoder)

    def connected(self, slot: int) -> None:
        for decoding in list(self.decodings.values()):
            if slot in decoding.using and slot not in decoding.chunks:
                self._fetch(decoding)
        for order, decoder in list(self.fillings.values()):
            if decoder == slot:
                self._ask(order, decoder)

    def give_up(self) -> None:
        """Request another epoch, and so another plan: somebody who is needed is gone."""
        self._request("an agent that is needed for a repair is away")

    def _ask(self, order: Decode, decoder: int) -> None:
        if decoder != self.node.slot:
            again = messages.Decode(
                epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe, sources=order.sources,
                targets=(self.node.slot,), digests=order.digests, counts=order.counts,
            )  # fmt: skip
            self.node.send(decoder, again)

    def _request(self, reason: str) -> None:
        self.node.dispatch(events.EpochNeeded(self.node.state.epoch, reason))

    # ---- decoding

    def decode(self, order: Decode) -> None:
        node, key = self.node, (order.snapshot.age, order.stripe)
        if order.epoch != node.state.epoch or node.state.copy(order.snapshot) is None:
            return
        if node.slot in order.targets:
            self.fillings.setdefault(key, (order, node.slot))
        if (running := self.decodings.get(key)) is not None:
            running.targets.update(slot for slot in order.targets if slot not in running.using)
            return
        self.decodings[key] = Decoding(order)
        self._fetch(self.decodings[key])

    def _fetch(self, decoding: Decoding) -> None:
        node, order = self.node, decoding.order
        copy = node.state.copy(order.snapshot)
        for slot in decoding.using:
            if slot in decoding.chunks:
                continue
            if slot != node.slot:
                node.send(slot, messages.Fetch(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe))
            elif copy is not None and order.stripe in copy.good:
                chunk = node.memory.chunk(copy, order.stripe)
                assert chunk is not None
                decoding.chunks[slot] = chunk[: copy.good[order.stripe].count]
            else:
                self._without(decoding, slot)
                return
        self._solve_if_complete(decoding)

    def source_lost(self, slot: int, snapshot: SnapshotId, stripe: int) -> None:
        """Do without a source that says that it has lost its chunk."""
        decoding = self.decodings.get((snapshot.age, stripe))
        if decoding is not None and slot in decoding.using and slot not in decoding.chunks:
            self._without(decoding, slot)

    def _without(self, decoding: Decoding, slot: int) -> None:
        decoding.lost.add(slot)
        if decoding.try_others():
            self._fetch(decoding)
            return
        order = decoding.order
        self.decodings.pop((order.snapshot.age, order.stripe), None)
        if port.needs_epoch(self.node.state, order.snapshot):
            self._request(f"slot {slot} has lost its chunk of stripe {order.stripe}")

    def _solve_if_complete(self, decoding: Decoding) -> None:
        if all(slot in decoding.chunks for slot in decoding.using) and not decoding.solving:
            decoding.solving = True
            key = decoding.order.snapshot.age, decoding.order.stripe
            self.node.order(("decode", *key), ("solve", key), key[0])

    def solve(self, key: Key) -> None:
        """Decode, check data against the digests of the order, and send the chunks to their owners."""
        decoding = self.decodings.get(key)
        if decoding is None or not decoding.solving:
            return
        node, order, decoding.solving = self.node, decoding.order, False
        group, buckets = node.state.group, node.memory.buckets
        columns, used = group.sources(order.stripe), {slot: decoding.chunks[slot] for slot in decoding.using}
        found = decode(group, order.stripe, used, {*columns, *decoding.targets, *decoding.chunks}, buckets)
        if any(self._wrong(order, slot, chunk) for slot, chunk in (used | found).items()):
            decoding.failed.add(decoding.using)
            if decoding.try_others():
                self._fetch(decoding)
                return
            del self.decodings[key]
            port.decoding_failed(node, order, decoding.holders)
            return
        del self.decodings[key]
        for slot, chunk in decoding.chunks.items():
            if found[slot][: len(chunk)] != chunk:
                self._accuse(order, slot)
        for slot in sorted(decoding.targets):
            count = order.counts[columns.index(slot)] if slot in columns else buckets
            chunk = found[slot][:count]
            part = Part(order.epoch, order.snapshot, order.stripe, slot, tuple(checksum(each) for each in chunk))
            if slot == node.slot:
                self.part(part, chunk)
            else:
                node.send(slot, part, chunk)

    def _accuse(self, order: Decode, slot: int) -> None:
        """Tell the holder of a chunk that it does not belong to the others."""
        if slot == self.node.slot:
            self.node.dispatch(events.Scrubbed(order.snapshot, order.stripe, False))
        else:
            self.node.send(slot, port.accusation(order))

    def _wrong(self, order: Decode, slot: int, chunk: list[Bytes]) -> bool:
        """Return whether a data chunk is not what the order says. Parity is right if the data that it stands for is."""
        sources = self.node.state.group.sources(order.stripe)
        if slot not in sources or len(order.digests) != len(sources):
            return False
        column = sources.index(slot)
        return digest_of(chunk[: order.counts[column]]) != order.digests[column]

    # ---- what arrives

    def send_chunk(self, to: int, snapshot: SnapshotId, stripe: int) -> None:
        """Send this agent's chunk if it still is what it was."""
        node = self.node
        copy = node.state.copy(snapshot)
        if copy is None or stripe not in copy.good:
            return
        record, held = copy.good[stripe], node.memory.chunk(copy, stripe)
        chunk = held[: record.count] if held is not None else []
        if digest_of(chunk) != record.digest:
            node.dispatch(events.Scrubbed(snapshot, stripe, False))
            if port.LOST_IS_TOLD:
                node.send(to, messages.ChunkLost(snapshot=snapshot, stripe=stripe))
            else:
                self._request(f"stripe {stripe} of slot {node.slot} has rotted")
            return
        sums = tuple(checksum(content) for content in chunk)
        node.send(to, Part(node.state.epoch, snapshot, stripe, node.slot, sums), chunk)

    def part(self, part: Part, chunk: list[Bytes]) -> None:
        """Take a chunk that arrived. A damaged one is asked for again later."""
        node, key = self.node, (part.snapshot.age, part.stripe)
        if part.epoch != node.state.epoch or tuple(checksum(content) for content in chunk) != part.sums:
            return
        if part.owner != node.slot:
            decoding = self.decodings.get(key)
            if decoding is not None and part.owner in decoding.using and part.owner not in decoding.chunks:
                decoding.chunks[part.owner] = list(chunk)
                self._solve_if_complete(decoding)
            return
        copy = node.state.copy(part.snapshot)
        if key not in self.fillings or copy is None or part.stripe in copy.good:
            return
        order, _ = self.fillings.pop(key)
        buffer = copy.data if part.stripe in node.memory.stripes else copy.parity
        assert buffer is not None
        node.world.truth.claimed(node, "data" if part.stripe in node.memory.stripes else "parity", buffer, key[0])
        node.memory.put(copy, part.stripe, list(chunk))
        sources = node.state.group.sources(part.stripe)
        value, count = digest(part.sums), len(part.sums)
        record = ChunkRecord(part.stripe, value, order.digests, count, order.counts)
        if node.slot in sources:
            record = ChunkRecord(part.stripe, value, (), count)
        node.dispatch(events.ChunkRebuilt(part.snapshot, record, part.sums))
