"""Read a data buffer so that every byte has been compared with the checksums its writers sealed it with."""

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import ChunkCorrupt
from keepwarm.ft.format.contents import HEAD_BYTES, Contents, contents_length, decode_contents


class BucketRotten(ChunkCorrupt):
    """A bucket in memory is not what was sealed. `index` counts from the start of the buffer."""

    def __init__(self, index: int) -> None:
        super().__init__(f"bucket {index} in memory does not match the checksum it was sealed with")
        self.index = index


class SealedData:
    """A data buffer and the xxh3_64 of each bucket. Reads one bucket at a time into memory of its own.

    A copy is compared, not the buffer: bytes that rot after the comparison are not read again.
    """

    def __init__(self, data: Bytes, sums: Sequence[int], bucket_bytes: int) -> None:
        self._data, self._sums, self._size = data, sums, bucket_bytes
        self._copy: Bytes = np.empty(bucket_bytes, np.uint8)
        self._copied = -1

    @property
    def size(self) -> int:
        """Bytes that were sealed."""
        return len(self._sums) * self._size

    def blocks(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yield bytes `start ... stop`. A block is valid until the next one. Raise `BucketRotten` if any differ."""
        while start < stop:
            index, offset = divmod(start, self._size)
            count = min(stop - start, self._size - offset)
            yield self._bucket(index)[offset : offset + count].data
            start += count

    def _bucket(self, index: int) -> Bytes:
        if index != self._copied:
            self._copied = -1
            np.copyto(self._copy, self._data[index * self._size : (index + 1) * self._size])
            if xxhash.xxh3_64_intdigest(self._copy.data) != self._sums[index]:
                raise BucketRotten(index)
            self._copied = index
        return self._copy

    def parts(self) -> list[tuple[Contents, int]]:
        """Return the contents of all workers' parts, and where each part starts.

        Raise `BucketRotten`, or `IncompleteError` if the parts are not those of all workers of the node.
        """
        found: list[tuple[Contents, int]] = []
        at = 0
        while not found or len(found) < found[0][0].workers:
            length = contents_length(self._read(at, at + HEAD_BYTES))
            contents = decode_contents(self._read(at, at + length))
            found.append((contents, at))
            at += contents.size
        return found

    def _read(self, start: int, stop: int) -> bytes:
        return b"".join(bytes(block) for block in self.blocks(start, min(stop, self.size)))
