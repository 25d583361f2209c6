"""Decode a stripe bucket by bucket, in the memory of at most k + m buckets, whatever the length of its chunks."""

import itertools
from collections.abc import Collection, Mapping

import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.protocol.messages import Decode, digest
from keepwarm.ft.protocol.parity_placement import StripeGroup


class StripeDecoder:
    """One pass over a stripe, from the chunks of k holders to all other data chunks and those that are `wanted`.

    It uses the bucket in `buckets` of each slot that holds or gets a chunk, and is the only one to do so until its
    outputs have been sent. Its owner brings the buckets `index` of all holders, calls `decode` on a thread, uses
    `outputs` and calls `advance`. Before the last outputs are used, `damaged` and `mismatch` compare the chunks.
    """

    def __init__(
        self, codec: Codec, group: StripeGroup, order: Decode, buckets: Mapping[int, Bytes], *, using: Collection[int],
        wanted: Collection[int],
    ) -> None:  # fmt: skip
        slots = (*group.sources(order.stripe), *group.parities(order.stripe))
        self.column = {slot: column for column, slot in enumerate(slots)}
        self.using = frozenset(using)
        self.index, self.buckets = 0, max(order.counts, default=0)
        self._codec, self._order, self._data = codec, order, group.data
        missing = {slot for slot in slots if self.column[slot] < group.data} | set(wanted)
        self._inputs: dict[int, Bytes] = {slot: buckets[slot] for slot in self.using}
        self.outputs: dict[int, Bytes] = {slot: buckets[slot] for slot in missing - self.using}
        self.sums: dict[int, int] = {}
        """Checksums of `outputs`."""
        self.digests: dict[int, int] = dict.fromkeys(slots, 0)
        """Digests of the chunks so far, those of the holders as they arrived."""
        self.claims: dict[int, tuple[int, int]] = {}
        """Digests and lengths of holders' chunks as they say that they are."""
        self._here: set[int] = set()
        self._beyond: int | None = None
        self._size = len(next(iter(buckets.values())))
        self._without_rest()

    @property
    def complete(self) -> bool:
        return self.index >= self.buckets

    @property
    def last(self) -> bool:
        """Whether bucket `index` is the last one."""
        return self.index == self.buckets - 1

    @property
    def ready(self) -> bool:
        """Whether bucket `index` of all holders is here."""
        return not self.complete and self._here == self.using

    @property
    def awaited(self) -> set[int]:
        """Return the holders that must still send buckets."""
        return {slot for slot in self.using if self.start(slot) < self.length(slot)}

    @property
    def late(self) -> set[int]:
        """Return the holders whose buckets `index` are missing."""
        return set(self.using - self._here) if not self.complete else set()

    def length(self, slot: int) -> int:
        """Return the number of buckets of a slot's chunk that are decoded or given; the rest of the chunk is zeros."""
        column = self.column[slot]
        return self._order.counts[column] if column < self._data else self.buckets

    def start(self, slot: int) -> int:
        """Return the first bucket that a holder has not sent yet."""
        return self.index + (slot in self._here)

    def room(self, slot: int, index: int, size: int) -> memoryview | None:
        """Return memory for a holder's next bucket, None for any other bucket."""
        buffer = self._inputs.get(slot)
        if buffer is None or not self._expects(slot, index) or size > len(buffer):
            return None
        return buffer[:size].data

    def arrived(self, slot: int, index: int, size: int) -> bool:
        """Note that a bucket is in its `room`. Return False if it is not the one that was expected."""
        if not self._expects(slot, index) or size > len(self._inputs[slot]):
            return False
        self._inputs[slot][size:] = 0
        self._here.add(slot)
        return True

    def _expects(self, slot: int, index: int) -> bool:
        return slot in self.using and slot not in self._here and index == self.index and not self.complete

    def copy(self, slot: int, chunk: Bytes) -> None:
        """Take the next bucket of a holder from its chunk in this process's memory."""
        if self._expects(slot, self.index):
            size = len(self._inputs[slot])
            bucket = chunk[self.index * size : (self.index + 1) * size]
            self._inputs[slot][: len(bucket)] = bucket
            self.arrived(slot, self.index, len(bucket))

    def decode(self) -> None:
        """Compute `outputs` and `sums` of bucket `index`. Runs on a thread while the owner leaves the decoder alone."""
        column = self.column
        self._codec.decode(
            {column[slot]: data for slot, data in self._inputs.items()},
            {column[slot]: data for slot, data in self.outputs.items()},
        )
        self.sums = {slot: xxhash.xxh3_64_intdigest(data.data) for slot, data in self.outputs.items()}
        given = {slot: xxhash.xxh3_64_intdigest(data.data) for slot, data in self._inputs.items()}
        for slot, value in (self.sums | given).items():
            if self.index < self.length(slot):
                self.digests[slot] = digest((value,), self.digests[slot])
            elif slot in self.sums and self.outputs[slot].any():
                self._beyond = slot  # longer than what was written

    def damaged(self) -> int | None:
        """Return a holder whose chunk is not the one that it has, or None. Call after the last `decode`."""
        for slot in sorted(self.using):
            column = self.column[slot]
            if column < self._data:
                right = self.digests[slot] == self._order.digests[column]
            else:
                digest_, count = self.claims.get(slot, (0, 0))
                right = self.whole_digest(slot, count) == digest_
            if not right:
                return slot
        return None

    def mismatch(self) -> int | None:
        """Return the slot of a data chunk that would not be what was written, or None. Call after the last `decode`."""
        for slot in self.outputs:
            column = self.column[slot]
            if column < self._data and self.digests[slot] != self._order.digests[column]:
                return slot
        return self._beyond

    def whole_digest(self, slot: int, count: int) -> int:
        """Return the digest of a parity chunk of `count` buckets. Those after the longest data chunk are zeros."""
        if count <= self.buckets:
            return self.digests[slot]
        zeros = xxhash.xxh3_64_intdigest(bytes(self._size))
        return digest(itertools.repeat(zeros, count - self.buckets), self.digests[slot])

    def advance(self) -> None:
        """Go on to the next bucket."""
        self.index += 1
        self._here.clear()
        self._without_rest()

    def _without_rest(self) -> None:
        """Take zeros for the rest of chunks that are shorter than the longest."""
        for slot in self.using:
            if self.length(slot) <= self.index and not self.complete:
                self._inputs[slot].fill(0)
                self._here.add(slot)
