"""Layout of the agent's memory: data buffers, parity buffers, chunks of stripes, buckets of chunks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.groups import check_bucket
from keepwarm.ft.memory.growth import Growth
from keepwarm.ft.memory.shared_memory import SharedBuffer, require_memory
from keepwarm.ft.protocol.parity_placement import StripeGroup


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes derived from the group and from S. Every data chunk of a group has `chunk` buckets."""

    bucket_bytes: int
    chunk: int
    group: StripeGroup

    @classmethod
    def of(cls, state_bytes: int, bucket_bytes: int, group: StripeGroup) -> "Shape":
        buckets = -(-state_bytes // bucket_bytes)
        return cls(bucket_bytes=bucket_bytes, chunk=-(-buckets // group.data), group=group)

    @property
    def buckets(self) -> int:
        """Buckets of a data buffer."""
        return self.chunk * self.group.data

    @property
    def chunk_bytes(self) -> int:
        return self.chunk * self.bucket_bytes

    @property
    def data_bytes(self) -> int:
        """S rounded up to whole chunks."""
        return self.chunk_bytes * self.group.data

    @property
    def parity_bytes(self) -> int:
        return self.chunk_bytes * self.group.parity


READ_WINDOW = 2
"""Buckets of another node that are under way to one worker. More are requested as it takes them."""
READ_CACHE = 8
"""Buckets of other nodes that a worker holds at most while it reads."""


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes one node's agent uses: 2 S (1 + m/k), another S with the durable tier, and buffers of one bucket each."""

    data: int
    parity: int
    durable: int
    receiving: int
    decoding: int
    reading: int

    @property
    def total(self) -> int:
        return self.data + self.parity + self.durable + self.receiving + self.decoding + self.reading


def host_memory(
    state_bytes: int, *, members: int, parity: int, bucket_bytes: int, durable: bool, workers: int = 0
) -> HostMemory:
    """Return the memory snapshots use on a node of a group of `members` nodes with `parity` chunks per stripe. Pure.

    `state_bytes` is S, the bytes stored by the ranks of the group's largest node, rounded up to whole chunks. The
    buffers are allocated when the agent starts. `receiving` is the maximum in receive buffers while a snapshot is
    coded, one bucket for each peer of the group, and `decoding` that while a stripe is decoded, one for each of its
    chunks. `durable` has one bucket besides the buffer. `reading` is the maximum while `workers` ranks read from other
    nodes what another layout left there, or what they did not copy themselves.

    Raises:
        PlacementError: the state has too many buckets of this size.
    """
    check_bucket(state_bytes, bucket_bytes)
    group = StripeGroup(0, tuple(range(members)), parity if members > 1 else 0)
    shape = Shape.of(state_bytes, bucket_bytes, group)
    return HostMemory(
        data=2 * shape.data_bytes,
        parity=2 * shape.parity_bytes,
        durable=shape.data_bytes + bucket_bytes if durable else 0,
        receiving=(members - 1) * bucket_bytes if group.parity else 0,
        decoding=members * bucket_bytes if group.parity else 0,
        reading=READ_WINDOW * workers * bucket_bytes if members > 1 else 0,
    )


class Memory:
    """Data buffers of S bytes, which workers map, and parity buffers of S * m / k bytes, which only the agent uses."""

    def __init__(self, shape: Shape, slot: int, data: Sequence[int], parity: Sequence[int]) -> None:
        """Map the memory files, begin to take all of their memory (`growth`), and take the descriptors.

        Raise `MemoryTooSmall` with the arithmetic before anything is allocated.
        """
        parts = {f"in {len(data)} data buffers": len(data) * shape.data_bytes}
        if parity:
            parts[f"in {len(parity)} parity buffers"] = len(parity) * shape.parity_bytes
        if under_way := _under_way(shape, durable=len(data) > 2):
            parts["in buckets under way"] = under_way
        if not any(os.fstat(descriptor).st_size for descriptor in data):
            require_memory(parts)
        self.shape, self._slot = shape, slot
        self.data = [SharedBuffer.of(descriptor, shape.data_bytes) for descriptor in data]
        self.parity = [SharedBuffer.of(descriptor, shape.parity_bytes) for descriptor in parity]
        self.growth = Growth([*self.data, *self.parity])

    def data_bucket(self, buffer: int, index: int) -> Bytes:
        size = self.shape.bucket_bytes
        return self.data[buffer].data[index * size : (index + 1) * size]

    def data_chunk(self, buffer: int, stripe: int) -> Bytes:
        """Return this agent's data chunk of a stripe. Raise `ValueError` if it holds parity there."""
        return _part(self.data[buffer], self.shape.group.data_stripes(self._slot).index(stripe), self.shape.chunk_bytes)

    def parity_chunk(self, buffer: int, stripe: int) -> Bytes:
        """Return this agent's parity chunk of a stripe. Raise `ValueError` if it holds data there."""
        stripes = self.shape.group.parity_stripes(self._slot)
        return _part(self.parity[buffer], stripes.index(stripe), self.shape.chunk_bytes)

    def chunk(self, data: int | None, parity: int | None, stripe: int) -> Bytes:
        """Return this agent's chunk of a stripe, data or parity."""
        if stripe in self.shape.group.data_stripes(self._slot):
            assert data is not None
            return self.data_chunk(data, stripe)
        assert parity is not None
        return self.parity_chunk(parity, stripe)

    def buckets(self, chunk: Bytes) -> list[Bytes]:
        size = self.shape.bucket_bytes
        return [chunk[at : at + size] for at in range(0, len(chunk), size)]

    @property
    def bytes(self) -> int:
        return sum(buffer.size for buffer in (*self.data, *self.parity))

    def close(self) -> None:
        self.growth.close()
        for buffer in (*self.data, *self.parity):
            buffer.close()


def _under_way(shape: Shape, *, durable: bool) -> int:
    """Return the bytes of the buckets that are received, decoded and copied besides the buffers."""
    members, parity = shape.group.size, shape.group.parity
    memory = host_memory(0, members=members, parity=parity, bucket_bytes=shape.bucket_bytes, durable=durable)
    return memory.total


def _part(buffer: SharedBuffer, index: int, size: int) -> Bytes:
    return buffer.data[index * size : (index + 1) * size]
