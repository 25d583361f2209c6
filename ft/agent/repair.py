"""Chunks that are lost come back: fetched from k members of the group, decoded, checked, sent to where they belong.

The orders of an epoch stand beside its choice, so decoders and targets know them whatever messages were lost. A target
asks its decoder again while nothing comes, a decoder its sources; when one of them has gone for longer than
`silence`, the next epoch makes another plan.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash

from keepwarm.ft.agent.outbox import Job, Source, part_pieces
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import ChunkRecord, Decode, Fetch, Part, SnapshotId, digest

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

    def start(self, now: float) -> None:
        """Take the memory, which one stripe of an agent has at a time."""
        self.chunks = {slot: np.zeros(self.buckets * self.bucket_bytes, np.uint8) for slot in self.order.sources}
        self.heard = now

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.order.sources)

    @property
    def awaited(self) -> set[int]:
        return set(self.order.sources) - self.done if self.chunks else set()


class Filling:
    """One chunk of this agent being filled by a decoder."""

    def __init__(self, order: Decode, decoder: int, now: float) -> None:
        self.order, self.decoder, self.heard = order, decoder, now
        self.sums: dict[int, int] = {}


class Repair:
    """Decodes for others and receives what others decoded."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._decoding: dict[Key, Decoding] = {}
        """In order; the first one is under way."""
        self._filling: dict[Key, Filling] = {}
        self._absent: dict[int, float] = {}
        self.rebuilt = 0

    @property
    def awaited(self) -> set[int]:
        """Slots without which what this epoch restores is not whole; what is repaired at rest has time."""
        mine = self._shell.config.slot
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

    def follow(self, orders: Sequence[tuple[int, Decode]]) -> None:
        """Expect what others decode for this agent, then decode what is asked of it; `orders` are (decoder, order)."""
        shell = self._shell
        for decoder, order in orders:
            if decoder != shell.config.slot and shell.config.slot in order.targets:
                self._filling[order.snapshot, order.stripe] = Filling(order, decoder, shell.clock())
        for decoder, order in orders:
            if decoder == shell.config.slot:
                self.decode(order)

    def _request_epoch(self, reason: str) -> None:
        """What this epoch restores cannot be made whole any more."""
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
        """A link is back: what was under way on the one before is asked for again."""
        for decoding in list(self._decoding.values())[:1]:
            if slot in decoding.awaited:
                self._fetch(decoding)
        for filling in self._filling.values():
            if slot == filling.decoder:
                self._ask(filling, self._shell.clock())

    def _ask(self, filling: Filling, now: float) -> None:
        """Ask the decoder for this agent's chunk (again); it ignores that while it is at it."""
        filling.heard = now
        link = self._shell.network.links.get(filling.decoder)
        if link is not None:
            link.send(msgspec.structs.replace(filling.order, targets=(self._shell.config.slot,)))

    def _look_for_absent(self, now: float) -> None:
        """An epoch whose decoders or sources have gone cannot end: another one makes another plan."""
        shell = self._shell
        awaited = self.awaited - shell.network.links.keys()
        self._absent = {slot: self._absent.get(slot, now) for slot in awaited}
        for slot, since in self._absent.items():
            if now - since > shell.config.silence:
                self._request_epoch(f"slot {slot} has gone, and chunks that are being rebuilt need it")
                return

    # ---- decoding

    def decode(self, order: Decode) -> None:
        """Rebuild a stripe for its targets, after those that were asked for before; nothing when that is under way."""
        shell, key = self._shell, (order.snapshot, order.stripe)
        if order.epoch != shell.state.epoch or shell.state.copy(order.snapshot) is None:
            return
        if shell.config.slot in order.targets:
            self._filling.setdefault(key, Filling(order, shell.config.slot, shell.clock()))
        if (running := self._decoding.get(key)) is not None:
            running.targets.update(order.targets)
            return
        links = [shell.network.links.get(slot) for slot in order.targets]
        if all(link is not None and shell.outbox.holds(link, *key) for link in links):
            return
        self._decoding[key] = Decoding(order, shell.config.bucket_bytes)
        self._next()

    def _next(self) -> None:
        first = next(iter(self._decoding.values()), None)
        if first is not None and not first.chunks:
            first.start(self._shell.clock())
            self._fetch(first)

    def _fetch(self, decoding: Decoding) -> None:
        """Ask for what is missing of the sources; this agent's own chunk is copied."""
        shell, order = self._shell, decoding.order
        copy = shell.state.copy(order.snapshot)
        for slot in order.sources:
            if slot in decoding.done:
                continue
            if slot != shell.config.slot:
                link = shell.network.links.get(slot)
                if link is not None:
                    start = decoding.next[slot]
                    link.send(Fetch(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe, start=start))
            elif copy is not None and order.stripe in copy.good:
                chunk = shell.memory.chunk(copy.data, copy.parity, order.stripe)
                count = min(copy.good[order.stripe].count, decoding.buckets) * decoding.bucket_bytes
                decoding.chunks[slot][:count] = chunk[:count]
                decoding.done.add(slot)
            else:
                self._request_epoch(f"slot {slot} has lost its chunk of stripe {order.stripe}, which others need")
        if decoding.complete:
            self._solve(decoding)

    def _gathered(self, part: Part, decoding: Decoding) -> None:
        decoding.heard = self._shell.clock()
        if part.index == decoding.next[part.owner]:
            decoding.next[part.owner] += 1
        if decoding.next[part.owner] >= min(part.count, decoding.buckets) and part.owner not in decoding.done:
            decoding.done.add(part.owner)
            if decoding.complete:
                self._solve(decoding)

    def _solve(self, decoding: Decoding) -> None:
        shell, order = self._shell, decoding.order
        group = shell.state.group
        columns = {slot: column for column, slot in enumerate(group.sources(order.stripe))}
        columns |= {slot: group.data + row for row, slot in enumerate(group.parities(order.stripe))}
        total = shell.memory.shape.chunk * decoding.bucket_bytes
        targets = tuple(sorted(decoding.targets))

        def solve() -> dict[int, Bytes] | str:
            size = decoding.bucket_bytes
            for slot in order.sources:
                if (why := _wrong(decoding.chunks[slot], columns[slot], order, size)) is not None:
                    return f"the chunk of slot {slot} {why}"
            out = {slot: np.zeros(total, np.uint8) for slot in targets}
            length = decoding.buckets * size
            present = {columns[slot]: chunk for slot, chunk in decoding.chunks.items()}
            shell.codec.decode(present, {columns[slot]: chunk[:length] for slot, chunk in out.items()})
            for slot, chunk in out.items():
                if (why := _wrong(chunk, columns[slot], order, size)) is not None:
                    return f"the chunk decoded for slot {slot} {why}"
            return out

        def send(out: dict[int, Bytes] | str) -> None:
            key = order.snapshot, order.stripe
            if self._decoding.get(key) is not decoding:
                return
            if isinstance(out, str):
                shell.journal.write("error", "a stripe cannot be repaired", stripe=order.stripe, reason=out)
                self._request_epoch(f"stripe {order.stripe} cannot be repaired: {out}")
                del self._decoding[key]
            else:
                for slot, chunk in out.items():
                    column = columns[slot]
                    count = order.counts[column] if column < group.data else shell.memory.shape.chunk
                    self._deliver(order, slot, chunk, count)
                decoding.targets.difference_update(targets)
                if decoding.targets:  # others asked while this went on
                    self._solve(decoding)
                    return
                del self._decoding[key]
            self._next()

        shell.pool.run(solve, send)

    def _deliver(self, order: Decode, slot: int, chunk: Bytes, count: int) -> None:
        """Bring a decoded chunk to its owner, here or elsewhere; an empty one as a single empty part."""
        shell = self._shell
        size = shell.config.bucket_bytes
        pieces = part_pieces(
            Source(order.epoch, order.snapshot, order.stripe, slot), range(max(count, 1)), count,
            lambda index: chunk[index * size : (index + 1) * size if count else 0],
        )  # fmt: skip
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

    # ---- what arrives

    def target(self, part: Part, size: int) -> memoryview | None:
        """Where the payload of a part goes: into the chunk it belongs to, or into the decoding that gathers it."""
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
        """A part has arrived; without payload it was not wanted. One that is damaged is asked for again in time."""
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
        """A decoder sends one chunk after the other: who waits for a later one need not ask."""
        for filling in self._filling.values():
            if filling.decoder == decoder:
                filling.heard = self._shell.clock()

    def _filled(self, part: Part, filling: Filling) -> None:
        shell, order = self._shell, filling.order
        del self._filling[part.snapshot, part.stripe]
        if shell.state.copy(part.snapshot) is None:
            return
        sums = tuple(filling.sums[index] for index in range(part.count))
        group = shell.state.group
        value = digest(sums)
        if shell.config.slot in group.sources(part.stripe):
            column = group.sources(part.stripe).index(shell.config.slot)
            if (value, part.count) != (order.digests[column], order.counts[column]):
                shell.journal.write("error", "a rebuilt chunk is not the one that was lost", stripe=part.stripe)
                self._request_epoch(f"slot {filling.decoder} sent another chunk of stripe {part.stripe} than was lost")
                return
            record = ChunkRecord(part.stripe, value, (), part.count)
        else:
            record = ChunkRecord(part.stripe, value, order.digests, part.count, order.counts)
        self.rebuilt += 1
        shell.journal.write("info", "a chunk is back", snapshot=part.snapshot, stripe=part.stripe)
        shell.dispatch(events.ChunkRebuilt(part.snapshot, record, sums))

    # ---- what others ask for

    def send_chunk(self, to: int, snapshot: SnapshotId, stripe: int, start: int) -> None:
        """Check this agent's chunk against its digest, then send it; a chunk that has rotted is not sent."""
        shell = self._shell
        copy = shell.state.copy(snapshot)
        link = shell.network.links.get(to)
        if copy is None or stripe not in copy.good or link is None or shell.outbox.holds(link, snapshot, stripe):
            return
        record, size = copy.good[stripe], shell.config.bucket_bytes
        chunk = shell.memory.chunk(copy.data, copy.parity, stripe)[: record.count * size]
        epoch = shell.state.epoch

        def send(value: int) -> None:
            if value != record.digest:
                shell.dispatch(events.Scrubbed(snapshot, stripe, False))
                self._request_epoch(f"stripe {stripe} of slot {shell.config.slot} has rotted")
            else:
                source = Source(epoch, snapshot, stripe, shell.config.slot)
                pieces = part_pieces(
                    source, range(start, max(record.count, 1)), record.count,
                    lambda index: chunk[index * size : (index + 1) * size],
                )  # fmt: skip
                shell.outbox.add(link, Job(snapshot, stripe, pieces))

        shell.pool.run(lambda: digest(bucket_sums(chunk, size)), send)


def _wrong(chunk: Bytes, column: int, order: Decode, size: int) -> str | None:
    """Why a data chunk is not the one that was recorded; parity has nothing to be compared with here."""
    if column >= len(order.digests):
        return None
    count = order.counts[column]
    if digest(bucket_sums(chunk[: count * size], size)) != order.digests[column]:
        return "does not match its digest"
    return None
