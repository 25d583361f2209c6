"""Rebuild lost chunks: fetch k chunks from group members, decode, verify and send the result to its owner.

The orders of an epoch are stored with its decision, so decoders and targets know them even if messages are lost.
Targets repeat their request to the decoder while nothing arrives, and decoders repeat theirs to the sources. If one of
them is gone for longer than `silence`, the next epoch makes a new plan.
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
"""Seconds without progress after which a fetch or rebuilt chunk is requested again."""
Key = tuple[SnapshotId, int]


class Decoding:
    """One stripe for this agent to rebuild, and the k chunks it gathers, each as long as the longest data chunk."""

    def __init__(self, order: Decode, bucket_bytes: int) -> None:
        self.order, self.bucket_bytes = order, bucket_bytes
        self.targets = set(order.targets)
        self.buckets = max(order.counts, default=0)
        self.chunks: dict[int, Bytes] = {}
        self.next = dict.fromkeys(order.sources, 0)
        self.done: set[int] = set()
        self.heard = 0.0

    def start(self, now: float) -> None:
        """Allocate the memory. Only one stripe per agent is decoded at a time."""
        self.chunks = {slot: np.zeros(self.buckets * self.bucket_bytes, np.uint8) for slot in self.order.sources}
        self.heard = now

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.order.sources)

    @property
    def awaited(self) -> set[int]:
        return set(self.order.sources) - self.done if self.chunks else set()


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
        """Request the missing source buckets. This agent's own chunk is copied."""
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
                if decoding.targets:  # more targets asked in the meantime
                    self._solve(decoding)
                    return
                del self._decoding[key]
            self._next()

        shell.pool.run(solve, send)

    def _deliver(self, order: Decode, slot: int, chunk: Bytes, count: int) -> None:
        """Deliver a decoded chunk to its owner, local or remote. An empty chunk is sent as a single empty part."""
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
    """Return why a data chunk differs from its record, or None. Parity chunks have no reference to check here."""
    if column >= len(order.digests):
        return None
    count = order.counts[column]
    if digest(bucket_sums(chunk[: count * size], size)) != order.digests[column]:
        return "does not match its digest"
    return None
