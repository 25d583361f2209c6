"""Bytes of the chosen snapshot that a worker did not copy itself: asked for on its node, answered by the owner's agent.

A bucket counts as delivered once it has been passed on to the worker with the checksum that it was sent with. What is
missing is asked for again when a bucket comes damaged and when a link to the owner comes back.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from keepwarm.ft.agent.outbox import Job, Source, part_pieces
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.protocol.messages import READ_STRIPE, Part, Read, SnapshotId
from keepwarm.ft.transport.link import Link


@dataclass
class Wanted:
    """What one worker waits for from one owner."""

    read: Read
    missing: set[int] = field(default_factory=set)


class Reads:
    """Both ends: what workers of this node wait for, and what other agents asked this one for."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._wanted: dict[tuple[Link, int], Wanted] = {}
        self._early: list[tuple[Link, Read]] = []

    @property
    def awaited(self) -> set[int]:
        """Slots that workers of this node read from."""
        self._wanted = {key: wanted for key, wanted in self._wanted.items() if not key[0].closed and wanted.missing}
        return {owner for _, owner in self._wanted}

    # ---- for workers of this node

    def for_worker(self, link: Link, read: Read) -> None:
        if read.owner == self._shell.config.slot:
            self._answer(link, read)
            return
        wanted = self._wanted.get((link, read.owner))
        if wanted is None or wanted.read.snapshot != read.snapshot:
            wanted = self._wanted[link, read.owner] = Wanted(read)
        wanted.missing.update(range(read.first, read.first + read.count))
        self._shell.connect_peers(everyone=True)
        self._ask(read.owner, wanted, range(read.first, read.first + read.count))

    def connected(self, slot: int) -> None:
        """Parts may have been lost with the link before this one; one that comes twice does no harm."""
        for (link, owner), wanted in self._wanted.items():
            if owner == slot and not link.closed:
                self._ask(owner, wanted, wanted.missing)

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
            link.send(part, payload)
            wanted.missing.discard(part.index)

    def _waiting(self, part: Part) -> list[tuple[Link, Wanted]]:
        return [
            (link, wanted)
            for (link, owner), wanted in self._wanted.items()
            if owner == part.owner and wanted.read.snapshot == part.snapshot and part.index in wanted.missing
        ]

    def _ask(self, owner: int, wanted: Wanted, indices: Iterable[int]) -> None:
        """Without a link nothing is lost: `connected` asks."""
        link = self._shell.network.links.get(owner)
        if link is None:
            return
        for first, count in _runs(indices):
            read = wanted.read
            link.send(Read(epoch=read.epoch, snapshot=read.snapshot, owner=owner, first=first, count=count))

    # ---- for other agents

    def for_peer(self, sender: int, read: Read) -> None:
        link = self._shell.network.links.get(sender)
        if link is not None:
            self._answer(link, read)

    def answer_early(self) -> None:
        """The choice is known, or data that were missing are back: answer who asked too early."""
        early, self._early = self._early, []
        for link, read in early:
            if not link.closed:
                self._answer(link, read)

    def _answer(self, link: Link, read: Read) -> None:
        shell = self._shell
        buffer = self._whole(read.snapshot)
        if buffer is None:
            # Until this node's data are back; a later epoch may have begun meanwhile, its choice is the same.
            if (link, read) not in self._early:
                self._early.append((link, read))
            return
        total = shell.memory.shape.buckets
        pieces = part_pieces(
            Source(read.epoch, read.snapshot, READ_STRIPE, shell.config.slot),
            range(read.first, min(read.first + read.count, total)), total,
            lambda index: shell.memory.data_bucket(buffer, index),
        )  # fmt: skip
        shell.outbox.add(link, Job(read.snapshot, READ_STRIPE, pieces))

    def _whole(self, snapshot: SnapshotId) -> int | None:
        """The data buffer of a committed snapshot if all of this node's data are here."""
        state = self._shell.state
        copy = state.copy(snapshot)
        if copy is None or not copy.committed:
            return None
        return copy.data if all(stripe in copy.good for stripe in state.group.data_stripes(state.slot)) else None


def _runs(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of consecutive numbers."""
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
