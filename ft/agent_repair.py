"""Chunks that are lost come back: fetched from k members of the group, decoded, checked, sent to where they belong.

The orders of an epoch stand beside its choice, so decoders and targets know them whatever messages were lost. A target
asks its decoder again while nothing comes, a decoder its sources; when one of them has gone for longer than
`silence`, the next epoch makes another plan.
"""

import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import xxhash

from ft import events
from ft.agent_chunks import Job, part_pieces
from ft.buffers import bucket_sums
from ft.contents import Bytes
from ft.messages import ChunkRecord, Decode, Fetch, Part, SnapshotId, digest
from ft.state import Mode

if TYPE_CHECKING:
    from ft.agent import Agent

RETRY = 1.0
"""Seconds without progress after which a fetch or a rebuilt chunk is asked for again."""
Key = tuple[SnapshotId, int]


class Decoding:
    """One stripe to be rebuilt by this agent, and the k chunks it gathers, each as long as the longest data chunk."""

    def __init__(self, order: Decode, bucket_bytes: int) -> None:
        self.order, self.bucket_bytes = order, bucket_bytes
        self.targets = set(order.targets)
        self.buckets = max(order.counts, default=0)
        self.chunks: dict[int, Bytes] = {}
        self.next = dict.fromkeys(order.sources, 0)
        self.done: set[int] = set()
        self.heard = 0.0

    def start(self) -> None:
        """Takes the memory, which one stripe of an agent has at a time."""
        self.chunks = {slot: np.zeros(self.buckets * self.bucket_bytes, np.uint8) for slot in self.order.sources}
        self.heard = time.monotonic()

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.order.sources)

    @property
    def awaited(self) -> set[int]:
        return set(self.order.sources) - self.done if self.chunks else set()


class Filling:
    """One chunk of this agent being filled by a decoder."""

    def __init__(self, order: Decode, decoder: int) -> None:
        self.order, self.decoder = order, decoder
        self.heard = time.monotonic()
        self.sums: dict[int, int] = {}


class Repair:
    """Decodes for others and receives what others decoded."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self._decoding: dict[Key, Decoding] = {}
        """In order; the first one is under way."""
        self._filling: dict[Key, Filling] = {}
        self._absent: dict[int, float] = {}
        self._ordered = False
        self.rebuilt = 0

    @property
    def awaited(self) -> set[int]:
        """Slots without which what this epoch restores is not whole; what is repaired at rest has time."""
        mine = self._agent.config.slot
        found = {filling.decoder for filling in self._filling.values()}
        for decoding in self._decoding.values():
            if mine not in decoding.order.targets:
                found |= decoding.awaited
        return found - {mine}

    def begin_epoch(self) -> None:
        """What an earlier epoch had begun is void."""
        self._decoding.clear()
        self._filling.clear()
        self._absent.clear()
        self._ordered = False

    def take_orders(self) -> None:
        """Once the choice is in force and its orders are known: expect what others decode, decode what is asked."""
        agent, choice = self._agent, self._agent.settler.choice
        if self._ordered or choice is None or agent.state.mode is not Mode.ACTIVE:
            return
        if not choice.pin.epoch == agent.state.epoch == agent.state.pinned_epoch:
            return
        self._ordered = True
        for decoder, order in choice.orders:
            if decoder != agent.config.slot and agent.config.slot in order.targets:
                self._filling[order.snapshot, order.stripe] = Filling(order, decoder)
        for decoder, order in choice.orders:
            if decoder == agent.config.slot:
                self.decode(order)

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
        """A link is back: what was under way on the one before is asked for again."""
        for decoding in list(self._decoding.values())[:1]:
            if slot in decoding.awaited:
                self._fetch(decoding)
        for filling in self._filling.values():
            if slot == filling.decoder:
                self._ask(filling, time.monotonic())

    def _ask(self, filling: Filling, now: float) -> None:
        """Ask the decoder for this agent's chunk (again); it ignores that while it is at it."""
        filling.heard = now
        link = self._agent.network.links.get(filling.decoder)
        if link is not None:
            link.send(msgspec.structs.replace(filling.order, targets=(self._agent.config.slot,)))

    def _look_for_absent(self, now: float) -> None:
        """An epoch whose decoders or sources have gone cannot end: another one makes another plan."""
        agent = self._agent
        awaited = self.awaited - agent.network.links.keys()
        self._absent = {slot: self._absent.get(slot, now) for slot in awaited}
        for slot, since in self._absent.items():
            if now - since > agent.config.silence:
                agent.settler.request(f"slot {slot} has gone, and chunks that are being rebuilt need it")
                return

    # ---- decoding

    def decode(self, order: Decode) -> None:
        """Rebuild a stripe for its targets, after those that were asked for before; nothing when that is under way."""
        agent, key = self._agent, (order.snapshot, order.stripe)
        if order.epoch != agent.state.epoch or agent.state.copy(order.snapshot) is None:
            return
        if agent.config.slot in order.targets:
            self._filling.setdefault(key, Filling(order, agent.config.slot))
        if (running := self._decoding.get(key)) is not None:
            running.targets.update(order.targets)
            return
        links = [agent.network.links.get(slot) for slot in order.targets]
        if all(link is not None and agent.outbox.holds(link, *key) for link in links):
            return
        self._decoding[key] = Decoding(order, agent.config.bucket_bytes)
        self._next()

    def _next(self) -> None:
        first = next(iter(self._decoding.values()), None)
        if first is not None and not first.chunks:
            first.start()
            self._fetch(first)

    def _fetch(self, decoding: Decoding) -> None:
        """Ask for what is missing of the sources; this agent's own chunk is copied."""
        agent, order = self._agent, decoding.order
        copy = agent.state.copy(order.snapshot)
        for slot in order.sources:
            if slot in decoding.done:
                continue
            if slot != agent.config.slot:
                link = agent.network.links.get(slot)
                if link is not None:
                    start = decoding.next[slot]
                    link.send(Fetch(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe, start=start))
            elif copy is not None and order.stripe in copy.good:
                chunk = agent.memory.chunk(copy.data, copy.parity, order.stripe)
                count = min(copy.good[order.stripe].count, decoding.buckets) * decoding.bucket_bytes
                decoding.chunks[slot][:count] = chunk[:count]
                decoding.done.add(slot)
            else:
                agent.settler.request(f"slot {slot} has lost its chunk of stripe {order.stripe}, which others need")
        if decoding.complete:
            self._solve(decoding)

    def _gathered(self, part: Part, decoding: Decoding) -> None:
        decoding.heard = time.monotonic()
        if part.index == decoding.next[part.owner]:
            decoding.next[part.owner] += 1
        if decoding.next[part.owner] >= min(part.count, decoding.buckets) and part.owner not in decoding.done:
            decoding.done.add(part.owner)
            if decoding.complete:
                self._solve(decoding)

    def _solve(self, decoding: Decoding) -> None:
        agent, order = self._agent, decoding.order
        group = agent.state.group
        columns = {slot: column for column, slot in enumerate(group.sources(order.stripe))}
        columns |= {slot: group.data + row for row, slot in enumerate(group.parities(order.stripe))}
        total = agent.memory.shape.chunk * decoding.bucket_bytes
        targets = tuple(sorted(decoding.targets))

        def solve() -> dict[int, Bytes] | str:
            size = decoding.bucket_bytes
            for slot in order.sources:
                if (why := _wrong(decoding.chunks[slot], columns[slot], order, size)) is not None:
                    return f"the chunk of slot {slot} {why}"
            out = {slot: np.zeros(total, np.uint8) for slot in targets}
            length = decoding.buckets * size
            present = {columns[slot]: chunk for slot, chunk in decoding.chunks.items()}
            agent.codec.decode(present, {columns[slot]: chunk[:length] for slot, chunk in out.items()})
            for slot, chunk in out.items():
                if (why := _wrong(chunk, columns[slot], order, size)) is not None:
                    return f"the chunk decoded for slot {slot} {why}"
            return out

        def send(out: dict[int, Bytes] | str) -> None:
            key = order.snapshot, order.stripe
            if self._decoding.get(key) is not decoding:
                return
            if isinstance(out, str):
                agent.journal.write("error", "a stripe cannot be repaired", stripe=order.stripe, reason=out)
                agent.settler.request(f"stripe {order.stripe} cannot be repaired: {out}")
                del self._decoding[key]
            else:
                for slot, chunk in out.items():
                    column = columns[slot]
                    count = order.counts[column] if column < group.data else agent.memory.shape.chunk
                    self._deliver(order, slot, chunk, count)
                decoding.targets.difference_update(targets)
                if decoding.targets:  # others asked while this went on
                    self._solve(decoding)
                    return
                del self._decoding[key]
            self._next()

        agent.crew.run(solve, send)

    def _deliver(self, order: Decode, slot: int, chunk: Bytes, count: int) -> None:
        """Bring a decoded chunk to its owner, here or elsewhere; an empty one as a single empty part."""
        agent = self._agent
        size = agent.config.bucket_bytes
        pieces = part_pieces(
            order.epoch, order.snapshot, order.stripe, slot, range(max(count, 1)), count,
            lambda index: chunk[index * size : (index + 1) * size if count else 0],
        )  # fmt: skip
        if slot != agent.config.slot:
            link = agent.network.links.get(slot)
            if link is not None:
                agent.outbox.add(link, Job(order.snapshot, order.stripe, pieces))
            return
        for part, payload in pieces:
            assert isinstance(part, Part)
            target = self.target(part, part.size)
            if target is not None and payload is not None:
                target[:] = payload
                self.part(part, target)

    # ---- what arrives

    def target(self, part: Part, size: int) -> memoryview | None:
        """Where the payload of a part goes: into the chunk it belongs to, or into the decoding that gathers it."""
        agent = self._agent
        key = (part.snapshot, part.stripe)
        start = part.index * agent.config.bucket_bytes
        if size > agent.config.bucket_bytes or part.epoch != agent.state.epoch:
            return None
        if part.owner == agent.config.slot:
            copy = agent.state.copy(part.snapshot)
            if key not in self._filling or copy is None or part.stripe in copy.good:
                return None
            chunk = agent.memory.chunk(copy.data, copy.parity, part.stripe)
            return chunk[start : start + size].data if start + size <= len(chunk) else None
        decoding = self._decoding.get(key)
        if decoding is None or part.owner not in decoding.chunks or part.owner in decoding.done:
            return None
        chunk = decoding.chunks[part.owner]
        return chunk[start : start + size].data if start + size <= len(chunk) else np.empty(size, np.uint8).data

    def part(self, part: Part, payload: memoryview | None) -> None:
        """A part has arrived; without payload it was not wanted. One that is damaged is asked for again in time."""
        if payload is None:
            return
        if xxhash.xxh3_64_intdigest(payload) != part.sum:
            self._agent.journal.write("warning", "a part was damaged on its way", owner=part.owner, index=part.index)
            return
        key = (part.snapshot, part.stripe)
        if part.owner != self._agent.config.slot:
            if (decoding := self._decoding.get(key)) is not None:
                self._gathered(part, decoding)
        elif (filling := self._filling.get(key)) is not None:
            self._heard(filling.decoder)
            if part.size:
                filling.sums[part.index] = part.sum
            if len(filling.sums) == part.count:
                self._filled(part, filling)

    def _heard(self, decoder: int) -> None:
        """A decoder sends one chunk after the other: who waits for a later one need not ask."""
        for filling in self._filling.values():
            if filling.decoder == decoder:
                filling.heard = time.monotonic()

    def _filled(self, part: Part, filling: Filling) -> None:
        agent, order = self._agent, filling.order
        del self._filling[part.snapshot, part.stripe]
        if agent.state.copy(part.snapshot) is None:
            return
        sums = tuple(filling.sums[index] for index in range(part.count))
        group = agent.state.group
        value = digest(sums)
        if agent.config.slot in group.sources(part.stripe):
            column = group.sources(part.stripe).index(agent.config.slot)
            if (value, part.count) != (order.digests[column], order.counts[column]):
                agent.journal.write("error", "a rebuilt chunk is not the one that was lost", stripe=part.stripe)
                agent.settler.request(
                    f"slot {filling.decoder} sent another chunk of stripe {part.stripe} than was lost"
                )
                return
            record = ChunkRecord(part.stripe, value, (), part.count)
        else:
            record = ChunkRecord(part.stripe, value, order.digests, part.count, order.counts)
        self.rebuilt += 1
        agent.journal.write("info", "a chunk is back", snapshot=part.snapshot, stripe=part.stripe)
        agent.feed(events.ChunkRebuilt(part.snapshot, record, sums))

    # ---- what others ask for

    def send_chunk(self, to: int, snapshot: SnapshotId, stripe: int, start: int) -> None:
        """Check this agent's chunk against its digest, then send it; a chunk that has rotted is not sent."""
        agent = self._agent
        copy = agent.state.copy(snapshot)
        link = agent.network.links.get(to)
        if copy is None or stripe not in copy.good or link is None or agent.outbox.holds(link, snapshot, stripe):
            return
        record, size = copy.good[stripe], agent.config.bucket_bytes
        chunk = agent.memory.chunk(copy.data, copy.parity, stripe)[: record.count * size]
        epoch = agent.state.epoch

        def send(value: int) -> None:
            if value != record.digest:
                agent.feed(events.Scrubbed(snapshot, stripe, False))
                agent.settler.request(f"stripe {stripe} of slot {agent.config.slot} has rotted")
            else:
                pieces = part_pieces(
                    epoch, snapshot, stripe, agent.config.slot, range(start, max(record.count, 1)), record.count,
                    lambda index: chunk[index * size : (index + 1) * size],
                )  # fmt: skip
                agent.outbox.add(link, Job(snapshot, stripe, pieces))

        agent.crew.run(lambda: digest(bucket_sums(chunk, size)), send)


def _wrong(chunk: Bytes, column: int, order: Decode, size: int) -> str | None:
    """Why a data chunk is not the one that was recorded; parity has nothing to be compared with here."""
    if column >= len(order.digests):
        return None
    count = order.counts[column]
    if digest(bucket_sums(chunk[: count * size], size)) != order.digests[column]:
        return "does not match its digest"
    return None
