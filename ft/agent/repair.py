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
from keepwarm.ft.memory.stripe_decoder import StripeDecoder
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import ChunkRecord, Decode, Fetch, Part, SnapshotId, digest
from keepwarm.ft.transport.link import Link

RETRY = 1.0
"""Seconds without progress after which a fetch or rebuilt chunk is requested again."""
Key = tuple[SnapshotId, int]


class Decoding:
    """One stripe for this agent to rebuild: what is wanted, and the pass over it that is in progress.

    A holder's link is paused while its bucket waits for those of the others, so that memory stays bounded.
    """

    def __init__(self, order: Decode) -> None:
        self.order = order
        self.targets = set(order.targets)
        self.decoder: StripeDecoder | None = None
        self.busy = False
        """Whether a thread is decoding."""
        self.sending = 0
        """Targets that the last decoded bucket is still being sent to."""
        self.heard = 0.0
        self._paused: list[Link] = []

    @property
    def awaited(self) -> set[int]:
        return self.decoder.awaited if self.decoder is not None else set()

    @property
    def late(self) -> set[int]:
        """Return the sources that the next bucket waits for."""
        decoder = self.decoder
        return {slot for slot in self.awaited if decoder is not None and decoder.start(slot) == decoder.index}

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
        dropped = list(self._decoding.values())
        self._decoding.clear()
        self._filling.clear()
        for decoding in dropped:
            decoding.resume()
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
            if decoding.awaited and not (decoding.busy or decoding.sending) and now - decoding.heard > RETRY:
                decoding.heard = now
                self._fetch(decoding, decoding.late)
        for filling in self._filling.values():
            if now - filling.heard > RETRY:
                self._ask(filling, now)
        self._look_for_absent(now)

    def connected(self, slot: int) -> None:
        """Repeat the requests that were pending on the previous link to `slot`."""
        for decoding in list(self._decoding.values())[:1]:
            if slot in decoding.awaited:
                self._fetch(decoding, {slot})
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
        self._decoding[key] = Decoding(order)
        self._next()

    def _next(self) -> None:
        """Begin with the first stripe of the queue. Only one per agent is decoded at a time."""
        first = next(iter(self._decoding.values()), None)
        if first is not None and first.decoder is None:
            self._begin(first)

    def _begin(self, decoding: Decoding) -> None:
        shell, order = self._shell, decoding.order
        decoding.decoder = StripeDecoder(
            shell.codec, shell.state.group, order, shell.config.bucket_bytes, using=order.sources,
            targets=decoding.targets,
        )  # fmt: skip
        decoding.heard = shell.clock()
        self._fetch(decoding, decoding.late)

    def _fetch(self, decoding: Decoding, slots: set[int]) -> None:
        """Request the missing buckets of some sources."""
        shell, order, decoder = self._shell, decoding.order, decoding.decoder
        assert decoder is not None
        for slot in sorted(slots - {shell.config.slot}):
            link = shell.network.links.get(slot)
            if link is not None:
                start = decoder.start(slot)
                link.send(Fetch(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe, start=start))
        self._step(decoding)

    def _step(self, decoding: Decoding) -> None:
        """Decode the next bucket once all of it is here and the one before has been sent."""
        shell, order, decoder = self._shell, decoding.order, decoding.decoder
        assert decoder is not None
        if decoding.busy or decoding.sending or self._decoding.get(_key(order)) is not decoding:
            return
        if decoder.complete:
            self._finish(decoding)
            return
        mine = shell.config.slot
        if mine in decoder.awaited and decoder.start(mine) == decoder.index:
            copy = shell.state.copy(order.snapshot)
            if copy is None or order.stripe not in copy.good:
                self._request_epoch(f"slot {mine} has lost its chunk of stripe {order.stripe}, which others need")
                return
            decoder.copy(mine, shell.memory.chunk(copy.data, copy.parity, order.stripe))
        if decoder.ready:
            decoding.busy = True
            shell.pool.run(decoder.decode, lambda _: self._decoded(decoding, decoder))

    def _decoded(self, decoding: Decoding, decoder: StripeDecoder) -> None:
        """Send a decoded bucket: the last one, without which no target is complete, only if all data are right."""
        decoding.busy = False
        if self._decoding.get(_key(decoding.order)) is not decoding:
            return
        decoding.heard = self._shell.clock()
        if decoder.index == decoder.buckets - 1 and (why := decoder.wrong()) is not None:
            self._give_up(decoding, why)
            return
        index = decoder.index
        decoding.sending += 1
        for slot in sorted(decoder.targets):
            if index < decoder.length(slot):
                self._send(decoding, slot, index, decoder.outputs[slot], decoder.sums[slot])
        decoder.advance()
        decoding.resume()
        self._sent(decoding)

    def _send(self, decoding: Decoding, slot: int, index: int, data: Bytes, sum_: int) -> None:
        """Deliver a decoded bucket to its owner, local or remote. Its memory is in use until then."""
        shell, order, decoder = self._shell, decoding.order, decoding.decoder
        assert decoder is not None
        count = decoder.length(slot)
        if decoder.column[slot] >= shell.state.group.data:
            count = shell.memory.shape.chunk
        part = Part(
            epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe, owner=slot, index=index, count=count,
            sum=sum_, size=len(data),
        )  # fmt: skip
        if slot == shell.config.slot:
            room = self.target(part, part.size)
            if room is not None:
                room[:] = data.data
                self.part(part, room)
        elif (link := shell.network.links.get(slot)) is not None:
            decoding.sending += 1
            link.send(part, data.data, lambda: self._sent(decoding))

    def _sent(self, decoding: Decoding) -> None:
        decoding.sending -= 1
        if not decoding.sending:
            decoding.heard = self._shell.clock()
            self._step(decoding)

    def _finish(self, decoding: Decoding) -> None:
        """Send what follows the longest data chunk: zeros of parity, and a part for each chunk that is empty."""
        shell, decoder, key = self._shell, decoding.decoder, _key(decoding.order)
        assert decoder is not None
        if decoder.index == decoder.buckets:
            decoding.sending += 1
            zeros = np.zeros(shell.config.bucket_bytes, np.uint8)
            sum_ = xxhash.xxh3_64_intdigest(zeros.data)
            for slot in sorted(decoder.targets):
                if decoder.column[slot] >= shell.state.group.data:
                    for index in range(decoder.buckets, shell.memory.shape.chunk):
                        self._send(decoding, slot, index, zeros, sum_)
                elif not decoder.length(slot):
                    self._send(decoding, slot, 0, zeros[:0], xxhash.xxh3_64_intdigest(b""))
            decoder.index += 1  # said once
            self._sent(decoding)
            return
        decoding.targets -= decoder.targets
        if decoding.targets:  # more asked in the meantime
            self._begin(decoding)
            return
        del self._decoding[key]
        self._next()

    def _give_up(self, decoding: Decoding, why: str) -> None:
        order = decoding.order
        self._shell.journal.write("error", "a stripe cannot be repaired", stripe=order.stripe, reason=why)
        del self._decoding[_key(order)]
        decoding.resume()
        self._request_epoch(f"stripe {order.stripe} cannot be repaired: {why}")
        self._next()

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
        if decoding is None or decoding.decoder is None or decoding.busy:
            return None
        return decoding.decoder.room(part.owner, part.index, size)

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

    def _gathered(self, part: Part, decoding: Decoding) -> None:
        """Note a holder's bucket, and read on from it only when the stripe is at its next one."""
        decoder, link = decoding.decoder, self._shell.network.links.get(part.owner)
        if decoder is None or not decoder.arrived(part.owner, part.index, part.size):
            return
        decoding.heard = self._shell.clock()
        if link is not None and part.owner in decoder.awaited:
            decoding.pause(link)
        self._step(decoding)

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


def _key(order: Decode) -> Key:
    return order.snapshot, order.stripe
