"""Serve a worker the bytes of the chosen snapshot that it did not copy itself: its agent asks the owner's agent.

A bucket is sent with the checksum with which it was sealed and counts as delivered once it has been passed to the
worker with it. Missing buckets are requested again when one arrives damaged and when a link to the owner is restored.
The owner does not send a bucket that has rotted: its group decodes the chunk, and then the rest is sent.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np
import xxhash

from keepwarm.ft.agent.outbox import Job, Source, part_pieces
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.memory.buffers import READ_WINDOW
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import READ_STRIPE, Part, Read, SnapshotId, Wire
from keepwarm.ft.protocol.state import Copy
from keepwarm.ft.transport.link import Link


@dataclass
class Wanted:
    """Buckets that one worker is waiting for from one owner."""

    read: Read
    missing: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    """Those of `missing` that the owner was asked for."""
    passing: int = 0
    """Buckets in memory, on their way to the worker."""


class Reads:
    """Both ends of remote reads: requests by workers of this node, and requests by other agents to this one."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._wanted: dict[tuple[Link, int], Wanted] = {}
        self._early: list[tuple[Link, Read]] = []

    @property
    def awaited(self) -> set[int]:
        """Return the slots that workers of this node are reading from."""
        self._wanted = {key: wanted for key, wanted in self._wanted.items() if not key[0].closed and wanted.missing}
        return {owner for _, owner in self._wanted}

    # ---- requests of this node's workers

    def for_worker(self, link: Link, read: Read) -> None:
        if read.owner == self._shell.config.slot:
            self._answer(link, read)
            return
        wanted = self._wanted.get((link, read.owner))
        if wanted is None or wanted.read.snapshot != read.snapshot:
            wanted = self._wanted[link, read.owner] = Wanted(read)
        wanted.missing.update(range(read.first, read.first + read.count))
        self._shell.connect_peers(everyone=False)
        self._more(link, wanted)

    def connected(self, slot: int) -> None:
        """Request parts that may have been lost with the previous link. Receiving one twice is harmless."""
        for (link, owner), wanted in self._wanted.items():
            if owner == slot and not link.closed:
                self._ask(owner, wanted, wanted.asked)

    def target(self, part: Part, size: int) -> memoryview | None:
        fits = size <= self._shell.config.bucket_bytes
        return np.empty(size, np.uint8).data if fits and self._waiting(part) else None

    def part(self, part: Part, payload: memoryview | None) -> None:
        waiting = self._waiting(part)
        if payload is None or not waiting:
            return
        if xxhash.xxh3_64_intdigest(payload) != part.sum:
            self._shell.journal.write("warning", "a part was damaged on its way", owner=part.owner, index=part.index)
            self._ask(part.owner, waiting[0][1], [part.index])
            return
        for link, wanted in waiting:
            wanted.missing.discard(part.index)
            wanted.asked.discard(part.index)
            wanted.passing += 1
            link.send(part, payload, partial(self._taken, link, wanted))

    def _taken(self, link: Link, wanted: Wanted) -> None:
        """Request the next bucket, as the worker has taken one."""
        wanted.passing -= 1
        self._more(link, wanted)

    def _more(self, link: Link, wanted: Wanted) -> None:
        """Request as many buckets as the window allows: a slow worker must not fill the agent's memory."""
        room = READ_WINDOW - wanted.passing - len(wanted.asked)
        new = sorted(wanted.missing - wanted.asked)[: max(room, 0)]
        if new and not link.closed:
            wanted.asked.update(new)
            self._ask(wanted.read.owner, wanted, new)

    def _waiting(self, part: Part) -> list[tuple[Link, Wanted]]:
        return [
            (link, wanted)
            for (link, owner), wanted in self._wanted.items()
            if owner == part.owner and wanted.read.snapshot == part.snapshot and part.index in wanted.missing
        ]

    def _ask(self, owner: int, wanted: Wanted, indices: Iterable[int]) -> None:
        """Request buckets from their owner. Without a link, `connected` does so later."""
        link = self._shell.network.links.get(owner)
        if link is None:
            return
        for first, count in _runs(indices):
            read = wanted.read
            link.send(Read(epoch=read.epoch, snapshot=read.snapshot, owner=owner, first=first, count=count))

    # ---- requests of other agents

    def for_peer(self, sender: int, read: Read) -> None:
        link = self._shell.network.links.get(sender)
        if link is not None:
            self._answer(link, read)

    def answer_early(self) -> None:
        """Answer early requests now that the choice is known or missing data has been restored."""
        early, self._early = self._early, []
        for link, read in early:
            if not link.closed:
                self._answer(link, read)

    def _answer(self, link: Link, read: Read) -> None:
        shell = self._shell
        copy = self._whole(read.snapshot)
        if copy is None:
            # Wait until this node's data is back. A later epoch may have begun by then, but its choice is the same.
            if (link, read) not in self._early:
                self._early.append((link, read))
            return
        shell.outbox.add(link, Job(read.snapshot, READ_STRIPE, self._pieces(link, read, copy)))

    def _pieces(self, link: Link, read: Read, copy: Copy) -> Iterator[tuple[Wire, memoryview | None]]:
        """Yield the buckets of a read as long as they are what was sealed."""
        shell, sums, buffer = self._shell, copy.data_sums(self._shell.config.slot), copy.data
        assert buffer is not None
        source = Source(read.epoch, read.snapshot, READ_STRIPE, shell.config.slot, sums)
        stop = min(read.first + read.count, len(sums))
        for index in range(read.first, stop):
            data = shell.memory.data_bucket(buffer, index)
            if xxhash.xxh3_64_intdigest(data.data) != sums[index]:
                stripe = copy.group.data_stripes(shell.config.slot)[index // copy.geometry.chunk]
                shell.journal.write("warning", "a chunk has rotted", snapshot=read.snapshot, stripe=stripe)
                self._early.append((link, msgspec.structs.replace(read, first=index, count=stop - index)))
                shell.dispatch(events.Scrubbed(read.snapshot, stripe, False))
                return
            yield from part_pieces(source, range(index, index + 1), lambda _, data=data: data)  # type: ignore[misc]

    def _whole(self, snapshot: SnapshotId) -> Copy | None:
        """Return a committed snapshot if all of this node's data is present."""
        state = self._shell.state
        copy = state.copy(snapshot)
        if copy is None or not copy.committed:
            return None
        return copy if all(stripe in copy.good for stripe in state.group.data_stripes(state.slot)) else None


def _runs(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) for each run of consecutive numbers."""
    first, count = 0, 0
    for index in sorted(indices):
        if count and index == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = index, 1
    if count:
        yield first, count
