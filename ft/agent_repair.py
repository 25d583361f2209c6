"""Chunks that are lost come back: fetched from k members of the group, decoded, checked, sent to where they belong.

Also answers `Read`: the bytes of a chosen snapshot that a worker did not copy itself, from this node or another one.
"""

import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import xxhash

from ft import events
from ft.agent_chunks import READ_STRIPE, Job, part_pieces
from ft.agent_coding import codec
from ft.agent_workers import Guest
from ft.buffers import bucket_sums
from ft.contents import Bytes
from ft.messages import ChunkRecord, Decode, Fetch, Part, Read, SnapshotId, digest
from ft.state import Copy
from ft.transport import Link

if TYPE_CHECKING:
    from ft.agent import Agent

RETRY = 1.0
"""Seconds without progress after which a fetch is asked for again."""


class Decoding:
    """One stripe being rebuilt by this agent: the chunks it gathers, as long as the longest data chunk."""

    def __init__(self, order: Decode, buckets: int, bucket_bytes: int) -> None:
        self.order, self.buckets, self.bucket_bytes = order, buckets, bucket_bytes
        self.chunks = {slot: np.zeros(buckets * bucket_bytes, np.uint8) for slot in order.sources}
        self.next = dict.fromkeys(order.sources, 0)
        self.done: set[int] = set()
        self.heard = time.monotonic()

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.order.sources)


class Filling:
    """One chunk of this agent being filled by a decoder."""

    def __init__(self, order: Decode) -> None:
        self.order = order
        self.sums: dict[int, int] = {}


class Repair:
    """Decodes for others, receives what others decoded, and reads for workers."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self._decoding: dict[tuple[SnapshotId, int], Decoding] = {}
        self._filling: dict[tuple[SnapshotId, int], Filling] = {}
        self._later: dict[tuple[SnapshotId, int], list[Decode]] = {}
        """Orders that wait for another one of the same stripe: one rebuilds its data, the other its parity."""
        self._delivered: list[Decode] = []
        """Orders of this epoch that were carried out: their parts may have been lost with a link."""
        self._readers: dict[tuple[SnapshotId, int], list[Guest]] = {}
        self._reads: dict[tuple[Link, int], Read] = {}
        self._unanswered: list[tuple[Link, Read]] = []
        self.rebuilt = 0

    def begin_epoch(self) -> None:
        """What an earlier epoch had begun is void."""
        self._decoding.clear()
        self._later.clear()
        self._filling.clear()
        self._delivered.clear()

    def pinned(self) -> None:
        """The choice is known, or data that were missing are back: answer who asked too early."""
        waiting, self._unanswered = self._unanswered, []
        for link, read in waiting:
            if not link.closed:
                self._send_read(link, read)

    def tick(self, now: float) -> None:
        for decoding in list(self._decoding.values()):
            if not decoding.complete and now - decoding.heard > RETRY:
                decoding.heard = now
                self._fetch(decoding)

    # ---- decoding

    def decode(self, order: Decode) -> None:
        """Gather the sources of an order, this agent's own chunk first if it is one of them."""
        agent = self._agent
        copy = agent.state.copy(order.snapshot)
        if copy is None:
            return
        key = (order.snapshot, order.stripe)
        if key in self._decoding:
            self._later.setdefault(key, []).append(order)
            return
        size = agent.config.bucket_bytes
        decoding = self._decoding[key] = Decoding(order, max(order.counts, default=0), size)
        for target in order.targets:
            if target == agent.config.slot:
                self.expect(order)
            elif (link := agent.network.links.get(target)) is not None:
                link.send(order)
        self._fetch(decoding)

    def expect(self, order: Decode) -> None:
        """A decoder is going to send this agent's chunk of a stripe."""
        self._filling[order.snapshot, order.stripe] = Filling(order)

    def _fetch(self, decoding: Decoding) -> None:
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

        def solve() -> dict[int, Bytes] | str:
            size = decoding.bucket_bytes
            for slot in order.sources:
                if (why := _wrong(decoding.chunks[slot], columns[slot], order, size)) is not None:
                    return f"the chunk of slot {slot} {why}"
            out = {slot: np.zeros(total, np.uint8) for slot in order.targets}
            length = decoding.buckets * size
            present = {columns[slot]: chunk for slot, chunk in decoding.chunks.items()}
            codec(group.data, group.parity).decode(
                present, {columns[slot]: chunk[:length] for slot, chunk in out.items()}
            )
            for slot, chunk in out.items():
                if (why := _wrong(chunk, columns[slot], order, size)) is not None:
                    return f"the chunk decoded for slot {slot} {why}"
            return out

        def send(out: dict[int, Bytes] | str) -> None:
            key = (order.snapshot, order.stripe)
            if self._decoding.get(key) is not decoding:
                return
            del self._decoding[key]
            for later in self._later.pop(key, []):
                self.decode(later)
            if isinstance(out, str):
                agent.journal.write("error", "a stripe cannot be repaired", stripe=order.stripe, reason=out)
                agent.settler.request(f"stripe {order.stripe} cannot be repaired: {out}")
                return
            self._delivered.append(order)
            for slot, chunk in out.items():
                column = columns[slot]
                count = order.counts[column] if column < group.data else agent.memory.shape.chunk
                self._deliver(order, slot, chunk, count)

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
        if size > agent.config.bucket_bytes:
            return None
        if part.stripe == READ_STRIPE:
            return np.empty(size, np.uint8).data if (part.snapshot, part.owner) in self._readers else None
        if part.epoch != agent.state.epoch:
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
        """A part has arrived; without payload it was not wanted."""
        if payload is None:
            return
        if xxhash.xxh3_64_intdigest(payload) != part.sum:
            self._agent.journal.write("warning", "a part was damaged on its way", owner=part.owner, index=part.index)
            return
        if part.stripe == READ_STRIPE:
            for guest in self._readers.get((part.snapshot, part.owner), []):
                guest.link.send(part, payload)
                read = self._reads.get((guest.link, part.owner))
                if read is not None and part.index == read.first + read.count - 1:
                    del self._reads[guest.link, part.owner]
            return
        key = (part.snapshot, part.stripe)
        if part.owner != self._agent.config.slot:
            if (decoding := self._decoding.get(key)) is not None:
                self._gathered(part, decoding)
        elif (filling := self._filling.get(key)) is not None:
            if part.size:
                filling.sums[part.index] = part.sum
            if len(filling.sums) == part.count:
                del self._filling[key]
                self._filled(part, filling)

    def _filled(self, part: Part, filling: Filling) -> None:
        agent, order = self._agent, filling.order
        copy = agent.state.copy(part.snapshot)
        if copy is None:
            return
        sums = tuple(filling.sums[index] for index in range(part.count))
        group = agent.state.group
        value = digest(sums)
        if agent.config.slot in group.sources(part.stripe):
            column = group.sources(part.stripe).index(agent.config.slot)
            if (value, part.count) != (order.digests[column], order.counts[column]):
                agent.journal.write("error", "a rebuilt chunk is not the one that was lost", stripe=part.stripe)
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
        if copy is None or stripe not in copy.good:
            return
        record, size = copy.good[stripe], agent.config.bucket_bytes
        chunk = agent.memory.chunk(copy.data, copy.parity, stripe)[: record.count * size]
        epoch = agent.state.epoch

        def send(value: int) -> None:
            link = agent.network.links.get(to)
            if value != record.digest:
                agent.feed(events.Scrubbed(snapshot, stripe, False))
                agent.settler.request(f"stripe {stripe} of slot {agent.config.slot} has rotted")
            elif link is not None:
                pieces = part_pieces(
                    epoch, snapshot, stripe, agent.config.slot, range(start, max(record.count, 1)), record.count,
                    lambda index: chunk[index * size : (index + 1) * size],
                )  # fmt: skip
                agent.outbox.add(link, Job(snapshot, stripe, pieces))

        agent.crew.run(lambda: digest(bucket_sums(chunk, size)), send)

    def read_for_worker(self, guest: Guest, read: Read) -> None:
        """A worker of this node wants bytes that may lie on another one."""
        agent = self._agent
        if read.owner == agent.config.slot:
            self._send_read(guest.link, read)
            return
        readers = self._readers.setdefault((read.snapshot, read.owner), [])
        if guest not in readers:
            readers.append(guest)
        self._reads[guest.link, read.owner] = read
        agent.connect_peers(everyone=True)
        self._ask_again(read.owner)

    def connected(self, slot: int) -> None:
        """A link is back: what was under way on the one before is sent again."""
        self._ask_again(slot)
        agent = self._agent
        link = agent.network.links.get(slot)
        lives = agent.state.lives
        if link is None or link.theirs is None or not lives or lives[slot] != link.theirs.boot:
            return
        for order in [order for order in self._delivered if slot in order.targets]:
            self.decode(msgspec.structs.replace(order, targets=(slot,)))

    def _ask_again(self, owner: int) -> None:
        """Send the reads that wait for a node, also after it came back; a part that comes twice does no harm."""
        link = self._agent.network.links.get(owner)
        self._reads = {key: read for key, read in self._reads.items() if not key[0].closed}
        for (_, wanted), read in self._reads.items():
            if wanted == owner and link is not None:
                link.send(read)

    def read_for_peer(self, sender: int, read: Read) -> None:
        link = self._agent.network.links.get(sender)
        if link is not None:
            self._send_read(link, read)

    def _send_read(self, link: Link, read: Read) -> None:
        agent = self._agent
        copy: Copy | None = agent.state.copy(read.snapshot)
        stripes = agent.state.group.data_stripes(agent.config.slot)
        whole = copy is not None and copy.settled and all(stripe in copy.good for stripe in stripes)
        if copy is None or copy.data is None or not whole:
            # Until this node's data are back; a later epoch may have begun meanwhile, its choice is the same.
            self._unanswered.append((link, read))
            return
        slot = copy.data
        total = agent.memory.shape.chunk * agent.state.group.data
        pieces = part_pieces(
            read.epoch, read.snapshot, READ_STRIPE, agent.config.slot,
            range(read.first, min(read.first + read.count, total)), total,
            lambda index: agent.memory.data_bucket(slot, index),
        )  # fmt: skip
        agent.outbox.add(link, Job(read.snapshot, READ_STRIPE, pieces))

    def peer_lost(self, slot: int) -> None:
        """Fetches from it are asked for again when it is back; the next epoch makes another plan."""
        for decoding in self._decoding.values():
            if slot in decoding.next and slot not in decoding.done:
                decoding.heard = time.monotonic()


def _wrong(chunk: Bytes, column: int, order: Decode, size: int) -> str | None:
    """Why a data chunk is not the one that was recorded; parity has nothing to be compared with here."""
    if column >= len(order.digests):
        return None
    count = order.counts[column]
    if digest(bucket_sums(chunk[: count * size], size)) != order.digests[column]:
        return "does not match its digest"
    return None
