"""Bytes leave memory for the disk only if they are those that were sealed."""

import numpy as np
import pytest

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import IncompleteError
from keepwarm.ft.format.contents import Contents, Piece, encode_contents
from keepwarm.ft.memory.sealed_data import BucketRotten, SealedData
from keepwarm.ft.memory.shared_memory import bucket_sums

BUCKET = 4096


def buffer(workers: int = 2) -> Bytes:
    """A data buffer with the parts of `workers` ranks, three buckets each."""
    data = np.zeros(4 * workers * BUCKET, np.uint8)
    for rank in range(workers):
        piece = Piece(name="w", global_shape=(2000,), offsets=(0,), shape=(2000,), dtype="F32")
        contents = Contents(
            rank=rank, world=workers, workers=workers, size=3 * BUCKET, entries=((piece, BUCKET),), meta=b"{}"
        )
        head, at = encode_contents(contents), 3 * BUCKET * rank
        data[at : at + len(head)] = np.frombuffer(head, np.uint8)
        data[at + BUCKET : at + BUCKET + 8000] = np.arange(8000) % 251
    return data


def sealed(data: Bytes, workers: int = 2) -> SealedData:
    return SealedData(data, bucket_sums(data[: 3 * workers * BUCKET], BUCKET), BUCKET)


def read(reader: SealedData, start: int, stop: int) -> bytes:
    return b"".join(bytes(block) for block in reader.blocks(start, stop))


def test_sealed_data_head_longer_than_a_bucket_is_read_whole() -> None:
    contents = Contents(rank=0, world=1, workers=1, size=3 * BUCKET, entries=(), meta=bytes(range(250)) * 40)
    data = np.zeros(3 * BUCKET, np.uint8)
    head = encode_contents(contents)
    data[: len(head)] = np.frombuffer(head, np.uint8)
    assert sealed(data, 1).parts() == [(contents, 0)]


def test_sealed_data_reads_any_range() -> None:
    data = buffer()
    reader = sealed(data)
    for start, stop in ((0, 0), (5, 5), (0, 4096), (4000, 9000), (1, 24_576)):
        assert read(reader, start, stop) == data[start:stop].tobytes()
    assert [(contents.rank, at) for contents, at in reader.parts()] == [(0, 0), (1, 3 * BUCKET)]


@pytest.mark.parametrize("at", [0, 3, 9, 20, 3 * BUCKET + 2])
def test_sealed_data_rotten_head_is_an_error_with_its_bucket(at: int) -> None:
    data = buffer()
    reader = sealed(data)
    data[at] ^= 0x40
    with pytest.raises(BucketRotten) as caught:
        reader.parts()
    assert caught.value.index == at // BUCKET


def test_sealed_data_byte_that_rots_after_it_was_read_does_not_matter() -> None:
    data = buffer()
    reader = sealed(data)
    want = data[:BUCKET].tobytes()
    (block,) = reader.blocks(0, BUCKET)
    data[7] ^= 1
    assert bytes(block) == want
    assert read(reader, 0, BUCKET) == want  # the copy that was compared
    next(iter(reader.blocks(BUCKET, 2 * BUCKET)))
    with pytest.raises(BucketRotten):
        next(iter(reader.blocks(0, BUCKET)))


def test_sealed_data_without_parts_is_an_error() -> None:
    data = np.zeros(4 * BUCKET, np.uint8)
    with pytest.raises(IncompleteError, match="no part of a snapshot"):
        SealedData(data, bucket_sums(data, BUCKET), BUCKET).parts()
