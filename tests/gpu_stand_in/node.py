"""A node for one rank on a GPU: memory files that may be lost, and an agent in this process that grants them."""

import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import AgentError
from keepwarm.ft.format.contents import contents_length, decode_contents
from keepwarm.ft.memory.shared_memory import SharedBuffer
from keepwarm.ft.protocol.messages import Address, Attached, Granted, SnapshotId
from keepwarm.ft.worker.reader import RankPlace

BUCKET = 4096
BUFFERS = 2
PLACE = RankPlace(rank=0, world=1, workers=1, node=0, nodes=1, bucket_bytes=BUCKET)


@dataclass
class Sealed:
    """What a snapshot's memory held when it was sealed."""

    snapshot: SnapshotId
    sums: tuple[int, ...]
    data: Bytes

    @property
    def pieces(self) -> dict[str, bytes]:
        """The bytes of every piece. The checksums must be those of the memory."""
        size = len(self.data) // len(self.sums)
        for index, checksum in enumerate(self.sums):
            assert xxhash.xxh3_64_intdigest(self.data[index * size : (index + 1) * size].data) == checksum
        contents = decode_contents(self.data[: contents_length(self.data)])
        return {piece.name: self.data[at : at + piece.bytes].tobytes() for piece, at in contents.entries}


@dataclass
class Node:
    """Memory of `buckets` buckets a buffer, and what was sealed in it."""

    buckets: int
    before: int = 0
    """Buckets of other ranks' parts, before that of this rank."""
    files: list[int] = field(default_factory=list)
    sealed: list[Sealed] = field(default_factory=list)
    cancelled: list[SnapshotId] = field(default_factory=list)
    granted: list[SnapshotId] = field(default_factory=list)
    on_cancel: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        weakref.finalize(self, _close_all, self.files)
        self.lose()

    def lose(self) -> None:
        """Lose the memory, as with a keeper: the next agent has files of its own."""
        _close_all(self.files)
        self.files.extend(os.memfd_create("snapshot") for _ in range(BUFFERS))
        for descriptor in self.files:
            os.ftruncate(descriptor, (self.before + self.buckets) * BUCKET + mmap.PAGESIZE)

    def client(self) -> Any:
        return Client(self)


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


class Client:
    """The part of an `AgentClient` that snapshots need."""

    run, epoch, gone = "run", 1, False

    def __init__(self, node: Node) -> None:
        self._node = node
        self.buffers: list[SharedBuffer] = []

    def attach(self, *, layout: str, workers: int, buckets: int, deadline: float) -> Attached:
        node = self._node
        assert buckets == node.buckets
        size = (node.before + buckets) * BUCKET
        self.buffers = [SharedBuffer(os.dup(descriptor), size) for descriptor in node.files]
        return Attached(
            epoch=1, buffers=BUFFERS, buffer_bytes=size, bucket_bytes=BUCKET, first=node.before,
            address=Address("127.0.0.1", 1, 1),
        )  # fmt: skip

    def open(self, snapshot: SnapshotId, *, wait: bool, deadline: float) -> Granted:
        node = self._node
        if len(node.granted) > len(node.sealed) + len(node.cancelled):
            raise AgentError("the last buffer was not given back")
        node.granted.append(snapshot)
        return Granted(snapshot=snapshot, buffer=snapshot.step % BUFFERS)

    def revoked(self, snapshot: SnapshotId) -> bool:
        return False

    def seal(self, snapshot: SnapshotId, sums: tuple[int, ...]) -> None:
        data = self.buffers[snapshot.step % BUFFERS].data[self._node.before * BUCKET :]
        self._node.sealed.append(Sealed(snapshot, sums, np.array(data)))

    def cancel(self, snapshot: SnapshotId) -> None:
        self._node.cancelled.append(snapshot)
        self._node.on_cancel()

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.close()
