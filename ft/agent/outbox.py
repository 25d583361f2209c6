"""Bulk data on its way out: which bucket goes to whom next, straight from the slots, a little at a time.

Every link has its own queue, so that a slow peer holds up nobody else, and gets its next bucket only when little is
left to send. Buckets of a chunk go in order; chunks of one link one after the other.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.protocol.messages import Bucket, ChunkEnd, Part, SnapshotId, Wire, digest
from keepwarm.ft.transport.link import Link

Piece = tuple[Wire, "memoryview | None"]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The chunk of slot `owner` that parts are sent of, and the epoch in which they are asked for."""

    epoch: int
    snapshot: SnapshotId
    stripe: int
    owner: int


class Job:
    """One chunk being sent: what it belongs to, and what is left of it."""

    def __init__(self, snapshot: SnapshotId, stripe: int, pieces: Iterator[Piece]) -> None:
        self.snapshot, self.stripe, self.pieces = snapshot, stripe, pieces


class Outbox:
    """Chunks to be sent, by link."""

    def __init__(self) -> None:
        self._jobs: dict[Link, collections.deque[Job]] = {}

    def add(self, link: Link, job: Job, *, replace: bool = False) -> None:
        """Queue a chunk; with `replace` instead of what is left of the same snapshot and stripe to this link."""
        if link.closed:
            return
        queue = self._jobs.setdefault(link, collections.deque())
        if replace:
            for old in [old for old in queue if (old.snapshot, old.stripe) == (job.snapshot, job.stripe)]:
                queue.remove(old)
        queue.append(job)
        self.drained(link)

    def drained(self, link: Link) -> None:
        """Queue a little more on the link."""
        queue = self._jobs.get(link)
        while queue and link.open and link.channel.pending < Link.LOW_WATER:
            piece = next(queue[0].pieces, None)
            if piece is None:
                queue.popleft()
                continue
            link.send(*piece)

    def stop(self, wanted: Callable[[Job], bool]) -> None:
        """Forget the chunks that `wanted` names; buckets given to a link already are still sent."""
        for link, queue in list(self._jobs.items()):
            self._jobs[link] = collections.deque(job for job in queue if not wanted(job))

    def holds(self, link: Link, snapshot: SnapshotId, stripe: int) -> bool:
        """Whether a chunk of the stripe still waits to be sent on the link."""
        return any((job.snapshot, job.stripe) == (snapshot, stripe) for job in self._jobs.get(link, ()))

    def forget(self, link: Link) -> None:
        self._jobs.pop(link, None)

    @property
    def idle(self) -> bool:
        return not any(self._jobs.values())


def chunk_pieces(
    snapshot: SnapshotId, stripe: int, sums: tuple[int, ...], start: int, bucket: Callable[[int], Bytes]
) -> Iterator[Piece]:
    """A data chunk for the parity of its stripe; `bucket(i)` gives the bytes of the chunk's bucket i."""
    for index in range(start, len(sums)):
        data = bucket(index)
        yield (
            Bucket(snapshot=snapshot, stripe=stripe, index=index, sum=sums[index], size=len(data)),
            data.data,
        )
    yield ChunkEnd(snapshot=snapshot, stripe=stripe, count=len(sums), digest=digest(sums)), None


def part_pieces(source: Source, indices: range, count: int, bucket: Callable[[int], Bytes]) -> Iterator[Piece]:
    """Buckets `indices` of a chunk of `count` buckets, each with the checksum of what is in memory now."""
    for index in indices:
        data = bucket(index)
        yield (
            Part(
                epoch=source.epoch,
                snapshot=source.snapshot,
                stripe=source.stripe,
                owner=source.owner,
                index=index,
                count=count,
                sum=xxhash.xxh3_64_intdigest(data.data),
                size=len(data),
            ),
            data.data,
        )
