"""Rebuild lost chunks: fetch k chunks from group members, decode, verify and send the result to its owner.

The orders of an epoch are stored with its decision, so decoders and targets know them even if messages are lost.
Targets repeat their request to the decoder while nothing arrives, and decoders repeat theirs to the sources. If one of
them is gone for longer than `silence`, the next epoch makes a new plan.
"""

from collections.abc import Collection, Sequence

import msgspec
import numpy as np
import xxhash

from keepwarm.ft.agent.outbox import Job, Source, part_pieces
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.memory.stripe_decoder import StripeDecoder
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.decode_attempts import DecodeAttempts
from keepwarm.ft.protocol.messages import ChunkLost, ChunkRecord, ChunkWrong, Decode, Fetch, Part, SnapshotId, digest
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.transport.link import Link

RETRY = 1.0
"""Seconds without progress after which a fetch or rebuilt chunk is requested again."""
Key = tuple[SnapshotId, int]


class Decoding:
    """One stripe for this agent to rebuild: what is wanted, and the pass over it that is in progress.

    Decoded buckets are sent at once, the last one only after all data turned out right. If they did not, another pass
    sends all of them again. A holder's link is paused while its bucket waits for those of the others.
    """

    def __init__(self, order: Decode, group: StripeGroup) -> None:
        self.order, self.attempts = order, DecodeAttempts(order, group)
        self.targets = set(order.targets)
        self.serving: frozenset[int] = frozenset()
        """Targets of the pass."""
        self.decoder: StripeDecoder | None = None
        self.ended = False
        """Whether everything of the pass has been queued."""
        self.heard = self.asked = 0.0
        self._paused: list[Link] = []

    @property
    def key(self) -> Key:
        return self.order.snapshot, self.order.stripe

    @property
    def awaited(self) -> set[int]:
        return self.decoder.awaited if self.decoder is not None else set()

    def restart(self) -> None:
        """Give up the pass, so that the next one begins."""
        self.decoder = None
        self.resume()

    def pause(self, link: Link) -> None:
        link.pause()
        self._paused.append(link)

    def resume(self) -> None:
        """Read on from all holders."""
        paused, self._paused = self._paused, []
        for link in paused:
            link.resume()


class Filling:
    """One chunk of this agent that a decoder is filling."""

    def __init__(self, order: Decode, decoder: int, now: float) -> None:
        self.order, self.decoder, self.heard = order, decoder, now
        self.sums: dict[int, int] = {}
        """Checksums of the buckets that are in memory."""


class Repair:
    """Decodes chunks for other agents and receives chunks that others decoded."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._decoding: dict[Key, Decoding] = {}
        """Queue of decodings. The first one is in progress."""
        self._filling: dict[Key, Filling] = {}
        self._absent: dict[int, float] = {}
        self._buckets: dict[int, Bytes] = {}
        """Memory for decoding, a bucket for each member of the group, from the first time on."""
        self._uses = 0
        """Threads and links that use the buckets. Nothing else is decoded until they are done, even in a new epoch."""
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
        dropped = list(self._decoding.values())
        self._decoding.clear()
        self._filling.clear()
        self._absent.clear()
        for decoding in dropped:
            decoding.restart()

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
        decoding = self._first
        if decoding is not None and decoding.decoder is not None:
            if now - decoding.heard > self._shell.config.silence:
                decoding.resume()  # no link is held up for ever; what is dropped is requested again
            if not self._uses and now - max(decoding.heard, decoding.asked) > RETRY:
                self._fetch(decoding, decoding.decoder.late)
        for filling in self._filling.values():
            if now - filling.heard > RETRY:
                self._ask(filling, now)
        self._look_for_absent(now)

    def connected(self, slot: int) -> None:
        """Repeat the requests that were pending on the previous link to `slot`."""
        decoding = self._first
        if decoding is not None and decoding.decoder is not None:
            self._fetch(decoding, decoding.decoder.late & {slot})
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
            running.targets.update(slot for slot in order.targets if slot not in running.attempts.using)
            return
        self._decoding[key] = Decoding(order, shell.state.group)
        self._advance()

    @property
    def _first(self) -> Decoding | None:
        return next(iter(self._decoding.values()), None)

    def _advance(self) -> None:
        """Go on with the first stripe of the queue: decode its next bucket once all of it is here."""
        decoding = self._first
        if decoding is None or self._uses:
            return
        shell, order = self._shell, decoding.order
        decoder = decoding.decoder or self._begin(decoding)
        if decoder.complete:
            self._finish(decoding, decoder)
            return
        mine = shell.config.slot
        if mine in decoder.late:
            copy = shell.state.copy(order.snapshot)
            if copy is None or order.stripe not in copy.good:
                self._without(decoding, mine, f"slot {mine} has lost its chunk of stripe {order.stripe}")
                return
            record = copy.good[order.stripe]
            chunk = shell.memory.chunk(copy.data, copy.parity, order.stripe)
            decoder.copy(mine, chunk[: record.count * shell.config.bucket_bytes])
            decoder.claims[mine] = record.digest, record.count
        if decoder.ready:
            self._uses += 1
            shell.pool.run(decoder.decode, lambda _: self._decoded(decoding, decoder))

    def _begin(self, decoding: Decoding) -> StripeDecoder:
        shell, attempts = self._shell, decoding.attempts
        group = shell.state.group
        for slot in group.members:
            if slot not in self._buckets:
                self._buckets[slot] = np.zeros(shell.config.bucket_bytes, np.uint8)
        decoding.serving, decoding.ended = frozenset(decoding.targets), False
        decoding.heard = shell.clock()
        decoding.decoder = decoder = StripeDecoder(
            shell.codec, group, decoding.order, self._buckets, using=attempts.using,
            wanted=decoding.serving | attempts.suspects,
        )  # fmt: skip
        self._fetch(decoding, decoder.late)
        return decoder

    def _fetch(self, decoding: Decoding, slots: Collection[int]) -> None:
        """Request the missing buckets of some holders."""
        shell, order, decoder = self._shell, decoding.order, decoding.decoder
        assert decoder is not None
        decoding.asked = shell.clock()
        for slot in sorted(slots):
            link = shell.network.links.get(slot)
            if link is not None:
                start = decoder.start(slot)
                link.send(Fetch(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe, start=start))

    def _gathered(self, part: Part, decoding: Decoding) -> None:
        """Note a holder's bucket, and read on from it only when the stripe is at its next one."""
        decoder, link = decoding.decoder, self._shell.network.links.get(part.owner)
        if decoder is None or not decoder.arrived(part.owner, part.index, part.size):
            return
        if part.count <= self._shell.memory.shape.chunk:
            decoder.claims[part.owner] = part.digest, part.count
        decoding.heard = self._shell.clock()
        if link is not None and part.owner in decoder.awaited:
            decoding.pause(link)
        self._advance()

    def source_lost(self, sender: int, lost: ChunkLost) -> None:
        """Do without a source that has lost its chunk since."""
        decoding = self._decoding.get((lost.snapshot, lost.stripe))
        if decoding is not None and sender in decoding.awaited:
            self._without(decoding, sender, f"slot {sender} has lost its chunk of stripe {lost.stripe}")

    def _without(self, decoding: Decoding, slot: int, why: str) -> None:
        """Use other holders than `slot`. If there are too few, only another choice can help a restore."""
        order, shell = decoding.order, self._shell
        if decoding.attempts.without(slot, decoding.targets):
            decoding.restart()
        else:
            self._drop(decoding)
            shell.journal.write("error", "a stripe cannot be repaired", stripe=order.stripe, reason=why)
            if order.snapshot == shell.state.decided != shell.state.committed:
                self._request_epoch(f"{why}, and others need it")
        self._advance()

    def _drop(self, decoding: Decoding) -> None:
        if self._decoding.get(decoding.key) is decoding:
            del self._decoding[decoding.key]
        decoding.restart()

    def _decoded(self, decoding: Decoding, decoder: StripeDecoder) -> None:
        """Send a decoded bucket: the last one, without which no chunk counts, only if all data are right."""
        self._uses -= 1
        if decoding.decoder is not decoder:  # given up in the meantime
            self._advance()
            return
        decoding.heard = self._shell.clock()
        if decoder.last:
            if (slot := decoder.damaged()) is not None:
                self._damaged(decoding, slot)
                return
            if (slot := decoder.mismatch()) is not None:
                self._mismatch(decoding, decoder, slot)
                return
        self._uses += 1
        for slot in sorted(decoding.serving):
            if decoder.index < decoder.length(slot):
                self._send(decoding, decoder, slot, decoder.index)
        decoder.advance()
        decoding.resume()
        self._used()

    def _used(self) -> None:
        """Go on once nothing uses the buckets any more."""
        self._uses -= 1
        if not self._uses:
            self._advance()

    def _damaged(self, decoding: Decoding, slot: int) -> None:
        """Gather the stripe again, at last without the slot. A damaged chunk of this agent's is corrupt in memory."""
        shell, order = self._shell, decoding.order
        mine = slot == shell.config.slot
        if not mine:
            shell.journal.write(
                "warning", "a chunk arrived other than it was sent", owner=slot, stripe=order.stripe
            )  # fmt: skip
        if not mine and decoding.attempts.damaged(slot):
            decoding.restart()
            self._advance()
            return
        self._without(decoding, slot, f"the chunk of slot {slot} of stripe {order.stripe} cannot be read")
        if mine:
            shell.dispatch(events.Scrubbed(order.snapshot, order.stripe, False))

    def _mismatch(self, decoding: Decoding, decoder: StripeDecoder, slot: int) -> None:
        """Try other parity, since one of the chunks is wrong. Exclude all of them if none is left."""
        order, shell, attempts = decoding.order, self._shell, decoding.attempts
        shell.journal.write(
            "error", "chunks of a stripe do not belong together", stripe=order.stripe, holders=attempts.using,
            reason=f"the chunk decoded for slot {slot} does not match its digest",
        )  # fmt: skip
        if attempts.mismatch(decoder.digests, decoding.targets):
            decoding.restart()
        else:
            self._drop(decoding)
            shell.dispatch(events.DecodeFailed(order.snapshot, order.stripe, attempts.holders))
        self._advance()

    def _finish(self, decoding: Decoding, decoder: StripeDecoder) -> None:
        """End a pass that succeeded. First send what follows the longest data chunk, and a part for empty chunks."""
        shell, order = self._shell, decoding.order
        if not decoding.ended:
            decoding.ended = True
            self._uses += 1
            for slot in sorted(decoding.serving):
                decoder.outputs[slot].fill(0)
                first, stop = decoder.buckets, self._count(decoder, order, slot)
                for index in range(first, stop) if stop else (0,):
                    self._send(decoding, decoder, slot, index)
            self._used()
            return
        wrong = set(decoding.attempts.wrong(decoder.digests)) - decoding.serving
        # Their owners get them decoded, so what was gathered says nothing about them any more.
        decoding.attempts.replaced(wrong | decoding.serving)
        decoding.targets -= decoding.serving
        if decoding.targets:  # more asked in the meantime
            decoding.restart()
        else:
            self._drop(decoding)
        for slot in sorted(wrong):
            if slot == shell.config.slot:
                shell.dispatch(events.Scrubbed(order.snapshot, order.stripe, False))
            elif (link := shell.network.links.get(slot)) is not None:
                link.send(ChunkWrong(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe))
        self._advance()

    def _count(self, decoder: StripeDecoder, order: Decode, slot: int) -> int:
        """Return the number of buckets of a rebuilt chunk. Parity is as long as the longest that the job allows."""
        column = decoder.column[slot]
        return order.counts[column] if column < self._shell.state.group.data else self._shell.memory.shape.chunk

    def _send(self, decoding: Decoding, decoder: StripeDecoder, slot: int, index: int) -> None:
        """Deliver a bucket to its owner, local or remote. Its memory is in use until then.

        The digest of parity is known with its last bucket.
        """
        shell, order, column = self._shell, decoding.order, decoder.column[slot]
        count = self._count(decoder, order, slot)
        data = decoder.outputs[slot][: None if count else 0]
        if column < shell.state.group.data:
            digest_ = order.digests[column]
        else:
            digest_ = decoder.whole_digest(slot, count) if index == count - 1 else 0
        sum_ = decoder.sums[slot] if not decoder.complete else xxhash.xxh3_64_intdigest(data.data)
        part = Part(
            epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe, owner=slot, index=index, count=count,
            sum=sum_, size=len(data), digest=digest_,
        )  # fmt: skip
        if slot == shell.config.slot:
            room = self.target(part, part.size)
            if room is not None:
                room[:] = data.data
                self.part(part, room)
        elif (link := shell.network.links.get(slot)) is not None:
            self._uses += 1
            link.send(part, data.data, self._used)

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
            filling = self._filling.get(key)
            if filling is None or copy is None or part.stripe in copy.good:
                return None
            chunk = shell.memory.chunk(copy.data, copy.parity, part.stripe)
            if start + size > len(chunk):
                return None
            filling.sums.pop(part.index, None)  # what was there is overwritten, and perhaps not completely
            return chunk[start : start + size].data
        decoding = self._decoding.get(key)
        if decoding is None or decoding.decoder is None:
            return None
        return decoding.decoder.room(part.owner, part.index, size)

    def part(self, part: Part, payload: memoryview | None) -> None:
        """Handle a part. Without a payload it was not wanted. A damaged part is requested again later."""
        if payload is None or part.epoch != self._shell.state.epoch:
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
            if len(filling.sums) == part.count and part.index == max(part.count, 1) - 1:
                self._filled(part, filling)  # the last one: no later pass replaces it

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
