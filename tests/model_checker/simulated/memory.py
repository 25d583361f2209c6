"""The buffers of one slot, as symbolic bytes, and which snapshot each of them was given to."""

from tests.model_checker.port import Copy, StripeGroup, digest
from tests.model_checker.simulated.content import NOTHING, ZEROS, Age, Bytes, Chunk, checksum, flipped


class Memory:
    """Data buffers of k chunks and parity buffers of one chunk for each stripe."""

    def __init__(self, group: StripeGroup, slot: int, buckets: int, data_buffers: int, parity_buffers: int) -> None:
        self.group, self.slot, self.buckets = group, slot, buckets
        self.stripes = group.data_stripes(slot)
        self.parity_stripes = group.parity_stripes(slot)
        self.data: list[Chunk] = [[ZEROS] * (buckets * group.data) for _ in range(data_buffers)]
        self.parity: list[dict[int, Chunk]] = [
            {stripe: [NOTHING] * buckets for stripe in self.parity_stripes} for _ in range(parity_buffers)
        ]
        self.owners: dict[tuple[str, int], Age] = {}
        """The snapshot that was last given a buffer, by ("data" or "parity", buffer)."""

    def chunk(self, copy: Copy, stripe: int) -> Chunk | None:
        """Return the copy's chunk of a stripe, or None if it has no buffer for it."""
        if stripe in self.stripes:
            if copy.data is None:
                return None
            first = self.stripes.index(stripe) * self.buckets
            return self.data[copy.data][first : first + self.buckets]
        return None if copy.parity is None else self.parity[copy.parity][stripe]

    def put(self, copy: Copy, stripe: int, chunk: Chunk) -> None:
        """Overwrite the beginning of the copy's chunk of a stripe."""
        if stripe in self.stripes:
            assert copy.data is not None
            first = self.stripes.index(stripe) * self.buckets
            self.data[copy.data][first : first + len(chunk)] = chunk
        else:
            assert copy.parity is not None
            self.parity[copy.parity][stripe][: len(chunk)] = chunk

    def flip(self, copy: Copy, stripe: int, index: int, salt: int) -> None:
        """Flip a bit of one bucket of a chunk."""
        chunk = self.chunk(copy, stripe)
        if chunk:
            chunk[index] = flipped(chunk[index], salt)
            self.put(copy, stripe, chunk)


def digest_of(chunk: list[Bytes]) -> int:
    """Return the digest that an agent computes of a chunk by reading it."""
    return digest(checksum(content) for content in chunk)
