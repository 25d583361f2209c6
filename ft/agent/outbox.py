"""Send bulk data: choose which bucket goes to which peer next, read straight from the buffers, a little at a time.

Each link has its own queue, so a slow peer delays only itself. A link gets its next bucket only when little is left to
send. Buckets of a chunk are sent in order, and the chunks of one link one after another.
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
    """The chunk of slot `owner` that parts are read from, with its known checksums, and the epoch of the request."""

    epoch: int
    snapshot: SnapshotId
    stripe: int
    owner: int
    sums: tuple[int, ...]
    digest: int = 0

    @property
    def indices(self) -> range:
        """Return the parts of the whole chunk. An empty chunk is one empty part."""
        return range(max(len(self.sums), 1))


class Job:
    """One chunk being sent: its identity and its remaining buckets."""

    def __init__(self, snapshot: SnapshotId, stripe: int, pieces: Iterator[Piece]) -> None:
        self.snapshot, self.stripe, self.pieces = snapshot, stripe, pieces


class Outbox:
    """Chunks queued for sending, by link."""

    def __init__(self) -> None:
        self._jobs: dict[Link, collections.deque[Job]] = {}

    def add(self, link: Link, job: Job, *, replace: bool = False) -> None:
        """Queue a chunk. With `replace`, drop what is left of the same snapshot and stripe on this link."""
        if link.closed:
            return
        queue = self._jobs.setdefault(link, collections.deque())
        if replace:
            for old in [old for old in queue if (old.snapshot, old.stripe) == (job.snapshot, job.stripe)]:
                queue.remove(old)
        queue.append(job)
        self.drained(link)

    def drained(self, link: Link) -> None:
        """Queue a few more buckets on the link."""
        queue = self._jobs.get(link)
        while queue and link.open and link.channel.pending < Link.LOW_WATER:
            piece = next(queue[0].pieces, None)
            if piece is None:
                queue.popleft()
                continue
            link.send(*piece)

    def stop(self, wanted: Callable[[Job], bool]) -> None:
        """Drop the chunks that `wanted` selects. Buckets already handed to a link are still sent."""
        for link, queue in list(self._jobs.items()):
            self._jobs[link] = collections.deque(job for job in queue if not wanted(job))

    def holds(self, link: Link, snapshot: SnapshotId, stripe: int) -> bool:
        """Return whether a chunk of the stripe is still waiting to be sent on the link."""
        return any((job.snapshot, job.stripe) == (snapshot, stripe) for job in self._jobs.get(link, ()))

    def forget(self, link: Link) -> None:
        self._jobs.pop(link, None)

    @property
    def idle(self) -> bool:
        return not any(self._jobs.values())


def chunk_pieces(
    snapshot: SnapshotId, stripe: int, sums: tuple[int, ...], start: int, bucket: Callable[[int], Bytes]
) -> Iterator[Piece]:
    """Yield a data chunk for the parity of its stripe. `bucket(i)` returns the bytes of the chunk's bucket i."""
    for index in range(start, len(sums)):
        data = bucket(index)
        yield (
            Bucket(snapshot=snapshot, stripe=stripe, index=index, sum=sums[index], size=len(data)),
            data.data,
        )
    yield ChunkEnd(snapshot=snapshot, stripe=stripe, count=len(sums), digest=digest(sums)), None


def part_pieces(source: Source, indices: range, bucket: Callable[[int], Bytes]) -> Iterator[Piece]:
    """Yield buckets `indices` of a chunk with the checksums of `source`, whatever is in memory by now."""
    empty = xxhash.xxh3_64_intdigest(b"")
    for index in indices:
        data = bucket(index)
        yield (
            Part(
                epoch=source.epoch,
                snapshot=source.snapshot,
                stripe=source.stripe,
                owner=source.owner,
                index=index,
                count=len(source.sums),
                sum=source.sums[index] if source.sums else empty,
                size=len(data),
                digest=source.digest,
            ),
            data.data,
        )
