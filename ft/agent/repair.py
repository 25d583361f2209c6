"""Rebuild lost chunks: fetch k chunks from group members, decode, verify and send the result to its owner.

The orders of an epoch are stored with its decision, so decoders and targets know them even if messages are lost.
Targets repeat their request to the decoder while nothing arrives, and decoders repeat theirs to the sources. If one of
them is gone for longer than `silence`, the next epoch makes a new plan.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import xxhash

from keepwarm.ft.agent.outbox import Job, Source, part_pieces
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import ChunkLost, ChunkRecord, ChunkWrong, Decode, Fetch, Part, SnapshotId, digest
from keepwarm.ft.protocol.parity_placement import StripeGroup

RETRY = 1.0
"""Seconds without progress after which a fetch or rebuilt chunk is requested again."""
DAMAGED_FETCHES = 3
"""Number of times that a chunk arrives other than it was sent before its holder is left out."""
Key = tuple[SnapshotId, int]


class Decoding:
    """One stripe for this agent to rebuild, and the k chunks it gathers, each as long as the longest data chunk.

    Data chunks have known digests, but a parity chunk may be wrong and match its own. What is decoded is therefore
    compared with the digests of the data; if it differs, other parity chunks are tried.
    """

    def __init__(self, order: Decode, group: StripeGroup, bucket_bytes: int) -> None:
        self.order, self.group, self.bucket_bytes = order, group, bucket_bytes
        self.targets = set(order.targets)
        self.buckets = max(order.counts, default=0)
        slots = (*group.sources(order.stripe), *group.parities(order.stripe))
        self.columns = {slot: column for column, slot in enumerate(slots)}
        self.using: tuple[int, ...] = order.sources
        self.chunks: dict[int, Bytes] = {}
        self.digests: dict[int, int] = {}
        """Digest of every chunk as its holder sent it."""
        self.next: dict[int, int] = {}
        self.done: set[int] = set()
        self.heard = 0.0
        self._failed: set[tuple[int, ...]] = set()
        self._damaged = Counter[int]()

    def start(self, now: float) -> None:
        """Allocate the memory. Only one stripe per agent is decoded at a time."""
        for slot in self.using:
            if slot not in self.chunks:
                self.chunks[slot] = np.zeros(self.buckets * self.bucket_bytes, np.uint8)
                self.next[slot] = 0
        self.heard = now

    @property
    def complete(self) -> bool:
        return self.done.issuperset(self.using)

    @property
    def awaited(self) -> set[int]:
        return set(self.using) - self.done if self.chunks else set()

    @property
    def holders(self) -> tuple[int, ...]:
        return (*self.order.sources, *self.order.spares)

    def damaged(self, slot: int) -> bool:
        """Gather a chunk again that arrived damaged. Return False if that has happened too often."""
        self._damaged[slot] += 1
        self.next[slot] = 0
        self.done.discard(slot)
        return self._damaged[slot] < DAMAGED_FETCHES

    def try_others(self, without: int | None = None) -> bool:
        """Use other holders: all those of data and other parity, without one. Return False if none are left.

        A wrong choice of parity fails with any data, so no others need to be tried.
        """
        if without is None:
            self._failed.add(tuple(sorted(self.using)))
        else:
            self._damaged[without] = DAMAGED_FETCHES
        here = [slot for slot in self.holders if self._damaged[slot] < DAMAGED_FETCHES and slot not in self.targets]
        data = [slot for slot in here if self.columns[slot] < self.group.data]
        parity = [slot for slot in here if slot not in data]
        for chosen in itertools.combinations(parity, self.group.data - len(data)):
            if tuple(sorted((*data, *chosen))) not in self._failed:
                self.using = (*data, *chosen)
                return True
        return False

    def solve(self, codec: Codec, targets: Sequence[int], length: int) -> "Solution":
        """Decode the chunks of `targets`, each of `length` buckets, from those that were gathered."""
        order, size = self.order, self.bucket_bytes
        for slot in self.using:
            column = self.columns[slot]
            digest_, count = self.digests[slot], length
            if column < self.group.data:
                digest_, count = order.digests[column], order.counts[column]
            if not self._matches(self.chunks[slot], digest_, count):
                return Solution(damaged=slot)
        seen = {slot for slot in self.columns if self._reference(slot)} - set(self.using)
        out = {slot: np.zeros(self.buckets * size, np.uint8) for slot in seen.difference(targets)}
        out |= {slot: np.zeros(length * size, np.uint8) for slot in targets}
        gathered = {self.columns[slot]: self.chunks[slot] for slot in self.using}
        rest = {self.columns[slot]: chunk[: self.buckets * size] for slot, chunk in out.items()}
        codec.decode(gathered, rest)
        for slot, chunk in out.items():
            column = self.columns[slot]
            if column < self.group.data and not self._matches(chunk, order.digests[column], order.counts[column]):
                return Solution(mismatch=slot)
        wrong = [slot for slot in self.done - set(self.using) if not np.array_equal(
            out[slot][: self.buckets * size], self.chunks[slot])]  # fmt: skip
        counts = {slot: order.counts[self.columns[slot]] if self.columns[slot] < self.group.data else length
                  for slot in targets}  # fmt: skip
        chunks = {slot: (out[slot], bucket_sums(out[slot][: counts[slot] * size], size)) for slot in targets}
        return Solution(chunks=chunks, wrong=tuple(wrong))

    def _reference(self, slot: int) -> bool:
        """Return whether the slot's chunk is known, as all data is, or was gathered for an earlier attempt."""
        return self.columns[slot] < self.group.data or slot in self.done

    def _matches(self, chunk: Bytes, expected: int, count: int) -> bool:
        """Return whether the chunk's `count` buckets have the digest. Those after the longest data chunk are zeros."""
        size = self.bucket_bytes
        sums = bucket_sums(chunk[: count * size], size)
        zeros = xxhash.xxh3_64_intdigest(bytes(size)) if count > len(sums) else 0
        return digest((*sums, *itertools.repeat(zeros, count - len(sums)))) == expected


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Result of decoding: the chunks with their bucket checksums, or why there are none."""

    chunks: Mapping[int, tuple[Bytes, tuple[int, ...]]] = field(default_factory=dict)
    wrong: tuple[int, ...] = ()
    """Holders of chunks that an earlier attempt used and that differ from what was decoded."""
    damaged: int | None = None
    """Holder of a chunk that is not the one that was sent."""
    mismatch: int | None = None
    """Slot of a data chunk that would be another one than was written."""


class Filling:
    """One chunk of this agent that a decoder is filling."""

    def __init__(self, order: Decode, decoder: int, now: float) -> None:
        self.order, self.decoder, self.heard = order, decoder, now
        self.sums: dict[int, int] = {}


class Repair:
    """Decodes chunks for other agents and receives chunks that others decoded."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._decoding: dict[Key, Decoding] = {}
        """Queue of decodings. The first one is in progress."""
        self._filling: dict[Key, Filling] = {}
        self._absent: dict[int, float] = {}
        self.rebuilt = 0

    @property
    def awaited(self) -> set[int]:
        """Return the slots required to complete this epoch's restore. Repairs at rest are not urgent."""
        mine = self._shell.config.slot
        found = {filling.decoder for filling in self._filling.values()}
        for decoding in self._decoding.values():
            if mine not in decoding.order.targets:
                found |= decoding.awaited
        return found - {mine}

    def begin_epoch(self) -> None:
        """Discard all repairs of earlier epochs."""
        self._decoding.clear()
        self._filling.clear()
        self._absent.clear()

    def follow(self, orders: Sequence[tuple[int, Decode]]) -> None:
        """Expect chunks decoded for this agent, then decode those assigned to it. `orders` are (decoder, order)."""
        shell = self._shell
        for decoder, order in orders:
            if decoder != shell.config.slot and shell.config.slot in order.targets:
                self._filling[order.snapshot, order.stripe] = Filling(order, decoder, shell.clock())
        for decoder, order in orders:
            if decoder == shell.config.slot:
                self.decode(order)

    def _request_epoch(self, reason: str) -> None:
        """Request a new epoch because this epoch's restore can no longer be completed."""
        self._shell.dispatch(events.EpochNeeded(self._shell.state.epoch, reason))

    def tick(self, now: float) -> None:
        for decoding in list(self._decoding.values())[:1]:
            if not decoding.complete and now - decoding.heard > RETRY:
                decoding.heard = now
                self._fetch(decoding)
        for filling in self._filling.values():
            if now - filling.heard > RETRY:
                self._ask(filling, now)
        self._look_for_absent(now)

    def connected(self, slot: int) -> None:
        """Repeat the requests that were pending on the previous link to `slot`."""
        for decoding in list(self._decoding.values())[:1]:
            if slot in decoding.awaited:
                self._fetch(decoding)
        for filling in self._filling.values():
            if slot == filling.decoder:
                self._ask(filling, self._shell.clock())

    def _ask(self, filling: Filling, now: float) -> None:
        """Ask the decoder for this agent's chunk (again). The decoder ignores the request while it is working on it."""
        filling.heard = now
        link = self._shell.network.links.get(filling.decoder)
        if link is not None:
            link.send(msgspec.structs.replace(filling.order, targets=(self._shell.config.slot,)))

    def _look_for_absent(self, now: float) -> None:
        """Request a new epoch, and so a new plan, if decoders or sources of this one have gone."""
        shell = self._shell
        awaited = self.awaited - shell.network.links.keys()
        self._absent = {slot: self._absent.get(slot, now) for slot in awaited}
        for slot, since in self._absent.items():
            if now - since > shell.config.silence:
                self._request_epoch(f"slot {slot} has gone, and chunks that are being rebuilt need it")
                return

    # ---- decoding

    def decode(self, order: Decode) -> None:
        """Queue a stripe to be rebuilt for its targets. Do nothing if that is already in progress."""
        shell, key = self._shell, (order.snapshot, order.stripe)
        if order.epoch != shell.state.epoch or shell.state.copy(order.snapshot) is None:
            return
        if not _sound(order, shell.state.group, shell.memory.shape.chunk):
            shell.journal.write("warning", "ignored an order that does not fit this group", stripe=order.stripe)
            return
        if shell.config.slot in order.targets:
            self._filling.setdefault(key, Filling(order, shell.config.slot, shell.clock()))
        if (running := self._decoding.get(key)) is not None:
            running.targets.update(slot for slot in order.targets if slot not in running.using)
            return
        links = [shell.network.links.get(slot) for slot in order.targets]
        if all(link is not None and shell.outbox.holds(link, *key) for link in links):
            return
        self._decoding[key] = Decoding(order, shell.state.group, shell.config.bucket_bytes)
        self._next()

    def _next(self) -> None:
        first = next(iter(self._decoding.values()), None)
        if first is not None and not first.chunks:
            first.start(self._shell.clock())
            self._fetch(first)

    def _fetch(self, decoding: Decoding) -> None:
        """Request the missing source buckets. This agent's own chunk is copied."""
        shell, order = self._shell, decoding.order
        copy = shell.state.copy(order.snapshot)
        for slot in decoding.using:
            if slot in decoding.done:
                continue
            if slot != shell.config.slot:
                link = shell.network.links.get(slot)
                if link is not None:
                    start = decoding.next[slot]
                    link.send(Fetch(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe, start=start))
            elif copy is not None and order.stripe in copy.good:
                chunk, record = shell.memory.chunk(copy.data, copy.parity, order.stripe), copy.good[order.stripe]
                count = min(record.count, decoding.buckets) * decoding.bucket_bytes
                decoding.chunks[slot][:count] = chunk[:count]
                decoding.digests[slot] = record.digest
                decoding.done.add(slot)
            else:
                self._without(decoding, slot, f"slot {slot} has lost its chunk of stripe {order.stripe}")
                return
        if decoding.complete:
            self._solve(decoding)

    def _gathered(self, part: Part, decoding: Decoding) -> None:
        decoding.heard = self._shell.clock()
        if part.index == decoding.next[part.owner]:
            decoding.next[part.owner] += 1
        if decoding.next[part.owner] >= min(part.count, decoding.buckets) and part.owner not in decoding.done:
            decoding.digests[part.owner] = part.digest
            decoding.done.add(part.owner)
            if decoding.complete:
                self._solve(decoding)

    def source_lost(self, sender: int, lost: ChunkLost) -> None:
        """Do without a source that has lost its chunk since."""
        decoding = self._decoding.get((lost.snapshot, lost.stripe))
        if decoding is not None and sender in decoding.awaited:
            self._without(decoding, sender, f"slot {sender} has lost its chunk of stripe {lost.stripe}")

    def _without(self, decoding: Decoding, slot: int, why: str) -> None:
        """Use other holders than `slot`. If there are too few, only another choice can help a restore."""
        order, shell = decoding.order, self._shell
        if decoding.try_others(without=slot):
            decoding.start(shell.clock())
            self._fetch(decoding)
            return
        self._drop(decoding)
        shell.journal.write("error", "a stripe cannot be repaired", stripe=order.stripe, reason=why)
        if order.snapshot == shell.state.decided != shell.state.committed:
            self._request_epoch(f"{why}, and others need it")
        self._next()

    def _drop(self, decoding: Decoding) -> None:
        self._decoding.pop((decoding.order.snapshot, decoding.order.stripe), None)

    def _solve(self, decoding: Decoding) -> None:
        shell, order = self._shell, decoding.order
        targets = tuple(sorted(decoding.targets))

        def solved(solution: Solution) -> None:
            if self._decoding.get((order.snapshot, order.stripe)) is not decoding:
                return
            if solution.damaged is not None:
                self._damaged(decoding, solution.damaged)
            elif solution.mismatch is not None:
                self._mismatch(decoding, solution.mismatch)
            else:
                self._deliver_all(decoding, solution)

        shell.pool.run(lambda: decoding.solve(shell.codec, targets, shell.memory.shape.chunk), solved)

    def _damaged(self, decoding: Decoding, slot: int) -> None:
        stripe = decoding.order.stripe
        self._shell.journal.write("warning", "a chunk arrived other than it was sent", owner=slot, stripe=stripe)
        if decoding.damaged(slot):
            self._fetch(decoding)
        else:
            self._without(decoding, slot, f"the chunk of slot {slot} of stripe {stripe} cannot be read")

    def _mismatch(self, decoding: Decoding, slot: int) -> None:
        """Try other parity, since one of the chunks is wrong. Exclude all of them if none is left."""
        order, shell = decoding.order, self._shell
        shell.journal.write(
            "error", "chunks of a stripe do not belong together", stripe=order.stripe, holders=decoding.using,
            reason=f"the chunk decoded for slot {slot} does not match its digest",
        )  # fmt: skip
        if decoding.try_others():
            decoding.start(shell.clock())
            self._fetch(decoding)
            return
        self._drop(decoding)
        shell.dispatch(events.DecodeFailed(order.snapshot, order.stripe, decoding.holders))
        self._next()

    def _deliver_all(self, decoding: Decoding, solution: Solution) -> None:
        shell, order = self._shell, decoding.order
        for slot, (chunk, sums) in solution.chunks.items():
            self._deliver(order, slot, chunk, sums)
        decoding.targets.difference_update(solution.chunks)
        for slot in solution.wrong:
            decoding.done.discard(slot)  # its owner has it decoded, so what was gathered says nothing about it any more
            if slot == shell.config.slot:
                shell.dispatch(events.Scrubbed(order.snapshot, order.stripe, False))
            elif (link := shell.network.links.get(slot)) is not None:
                link.send(ChunkWrong(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe))
        if decoding.targets:  # more targets asked in the meantime
            self._solve(decoding)
            return
        self._drop(decoding)
        self._next()

    def _deliver(self, order: Decode, slot: int, chunk: Bytes, sums: tuple[int, ...]) -> None:
        """Deliver a decoded chunk to its owner, local or remote."""
        shell = self._shell
        size = shell.config.bucket_bytes
        source = Source(order.epoch, order.snapshot, order.stripe, slot, sums, digest(sums))
        pieces = part_pieces(
            source, source.indices, lambda index: chunk[index * size : (index + 1) * size if sums else 0]
        )
        if slot != shell.config.slot:
            link = shell.network.links.get(slot)
            if link is not None:
                shell.outbox.add(link, Job(order.snapshot, order.stripe, pieces))
            return
        for part, payload in pieces:
            assert isinstance(part, Part)
            target = self.target(part, part.size)
            if target is not None and payload is not None:
                target[:] = payload
                self.part(part, target)

    # ---- incoming parts

    def target(self, part: Part, size: int) -> memoryview | None:
        """Return the destination of a part's payload: the chunk it belongs to, or the decoding that gathers it."""
        shell = self._shell
        key = (part.snapshot, part.stripe)
        start = part.index * shell.config.bucket_bytes
        if size > shell.config.bucket_bytes or part.epoch != shell.state.epoch:
            return None
        if part.owner == shell.config.slot:
            copy = shell.state.copy(part.snapshot)
            if key not in self._filling or copy is None or part.stripe in copy.good:
                return None
            chunk = shell.memory.chunk(copy.data, copy.parity, part.stripe)
            return chunk[start : start + size].data if start + size <= len(chunk) else None
        decoding = self._decoding.get(key)
        if decoding is None or part.owner not in decoding.chunks or part.owner in decoding.done:
            return None
        chunk = decoding.chunks[part.owner]
        return chunk[start : start + size].data if start + size <= len(chunk) else np.empty(size, np.uint8).data

    def part(self, part: Part, payload: memoryview | None) -> None:
        """Handle a part. Without a payload it was not wanted. A damaged part is requested again later."""
        if payload is None:
            return
        if xxhash.xxh3_64_intdigest(payload) != part.sum:
            self._shell.journal.write("warning", "a part was damaged on its way", owner=part.owner, index=part.index)
            return
        key = (part.snapshot, part.stripe)
        if part.owner != self._shell.config.slot:
            if (decoding := self._decoding.get(key)) is not None:
                self._gathered(part, decoding)
        elif (filling := self._filling.get(key)) is not None:
            self._heard(filling.decoder)
            if part.size:
                filling.sums[part.index] = part.sum
            if len(filling.sums) == part.count:
                self._filled(part, filling)

    def _heard(self, decoder: int) -> None:
        """Postpone retries for all chunks of a decoder that is active, because it sends them one after another."""
        for filling in self._filling.values():
            if filling.decoder == decoder:
                filling.heard = self._shell.clock()

    def _filled(self, part: Part, filling: Filling) -> None:
        shell, order = self._shell, filling.order
        if shell.state.copy(part.snapshot) is None:
            del self._filling[part.snapshot, part.stripe]
            return
        sums = tuple(filling.sums[index] for index in sorted(filling.sums))
        group, value = shell.state.group, digest(sums)
        record = ChunkRecord(part.stripe, value, order.digests, part.count, order.counts)
        if shell.config.slot in group.sources(part.stripe):
            record = ChunkRecord(part.stripe, value, (), part.count)
        if not self._is_the_lost_one(record, part, order):
            # A bucket in the wrong place, or another chunk: nothing of it is kept.
            shell.journal.write("warning", "a rebuilt chunk arrived other than it was sent", stripe=part.stripe)
            filling.sums.clear()
            self._ask(filling, shell.clock())
            return
        del self._filling[part.snapshot, part.stripe]
        self.rebuilt += 1
        shell.journal.write("info", "a chunk is back", snapshot=part.snapshot, stripe=part.stripe)
        shell.dispatch(events.ChunkRebuilt(part.snapshot, record, sums))

    def _is_the_lost_one(self, record: ChunkRecord, part: Part, order: Decode) -> bool:
        """Return whether a chunk arrived as it was decoded, and is as long as it must be."""
        if record.digest != part.digest:
            return False
        if record.sources:
            return part.count == self._shell.memory.shape.chunk
        column = self._shell.state.group.sources(part.stripe).index(self._shell.config.slot)
        return (record.digest, part.count) == (order.digests[column], order.counts[column])

    # ---- requests of other agents

    def send_chunk(self, to: int, snapshot: SnapshotId, stripe: int, start: int) -> None:
        """Verify this agent's chunk against its digest, then send it. A corrupt chunk is not sent."""
        shell = self._shell
        copy = shell.state.copy(snapshot)
        link = shell.network.links.get(to)
        if copy is None or stripe not in copy.good or link is None or shell.outbox.holds(link, snapshot, stripe):
            return
        record, size = copy.good[stripe], shell.config.bucket_bytes
        chunk = shell.memory.chunk(copy.data, copy.parity, stripe)[: record.count * size]
        epoch = shell.state.epoch

        def send(sums: tuple[int, ...]) -> None:
            if digest(sums) != record.digest:
                shell.dispatch(events.Scrubbed(snapshot, stripe, False))
                link.send(ChunkLost(snapshot=snapshot, stripe=stripe))
            else:
                source = Source(epoch, snapshot, stripe, shell.config.slot, sums, record.digest)
                pieces = part_pieces(
                    source, source.indices[start:], lambda index: chunk[index * size : (index + 1) * size]
                )
                shell.outbox.add(link, Job(snapshot, stripe, pieces))

        shell.pool.run(lambda: bucket_sums(chunk, size), send)


def _sound(order: Decode, group: StripeGroup, chunk: int) -> bool:
    """Return whether an order fits the group: k sources, and members that hold a chunk or lack it, not both."""
    holders, targets = (*order.sources, *order.spares), set(order.targets)
    distinct = len(set(holders)) == len(holders) and not targets.intersection(holders)
    lengths = len(order.sources) == len(order.digests) == len(order.counts) == group.data
    members = targets.union(holders).issubset(group.members) and order.stripe in range(group.size)
    return distinct and lengths and members and max(order.counts) <= chunk
