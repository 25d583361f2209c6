"""A stripe decoded bucket by bucket gives what it was coded from, in bounded memory, or says that it is wrong."""

import functools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.memory.stripe_decoder import StripeDecoder
from keepwarm.ft.protocol.messages import Decode, SnapshotId, digest
from keepwarm.ft.protocol.parity_placement import StripeGroup

BUCKET = 4096


@functools.cache
def codec(k: int, m: int) -> Codec:
    return Codec(k, m, kernel="numpy")


def coded(k: int, m: int, counts: tuple[int, ...], seed: int = 0) -> tuple[StripeGroup, Decode, dict[int, Bytes]]:
    """A group, the order to decode its stripe 0, and all chunks of the stripe by slot."""
    group = StripeGroup(0, tuple(range(k + m)), m)
    size = max(counts) * BUCKET
    random = np.random.default_rng(seed)
    chunks = {}
    for slot, count in zip(group.sources(0), counts, strict=True):
        chunks[slot] = np.zeros(size, np.uint8)
        chunks[slot][: count * BUCKET] = random.integers(0, 256, count * BUCKET, np.uint8)
    for row, slot in enumerate(group.parities(0)):
        chunks[slot] = np.zeros(size, np.uint8)
        for column, source in enumerate(group.sources(0)):
            codec(k, m).row(row).accumulate(chunks[slot], column, chunks[source])
    digests = tuple(
        digest(bucket_sums(chunks[slot][: count * BUCKET], BUCKET))
        for slot, count in zip(group.sources(0), counts, strict=True)
    )
    order = Decode(
        epoch=1, snapshot=SnapshotId("run", 1, 1, "l"), stripe=0, sources=(), targets=(), digests=digests, counts=counts
    )
    return group, order, chunks


def decoded(decoder: StripeDecoder, chunks: dict[int, Bytes], mine: int) -> dict[int, Bytes]:
    """The chunks of the targets, from holders of which one is in this process and the others send."""
    out = {slot: np.zeros(decoder.buckets * BUCKET, np.uint8) for slot in decoder.targets}
    while not decoder.complete:
        at = slice(decoder.index * BUCKET, (decoder.index + 1) * BUCKET)
        for slot in sorted(decoder.awaited):
            if slot == mine:
                decoder.copy(slot, chunks[slot])
                continue
            assert decoder.room(slot, decoder.index + 1, BUCKET) is None
            assert not decoder.arrived(slot, decoder.index + 1, BUCKET)
            if (room := decoder.room(slot, decoder.index, BUCKET)) is not None:
                room[:] = chunks[slot][at].data
                assert decoder.arrived(slot, decoder.index, BUCKET)
                assert decoder.room(slot, decoder.index, BUCKET) is None
        assert decoder.ready
        decoder.decode()
        for slot, chunk in out.items():
            chunk[at] = decoder.outputs[slot]
            assert decoder.sums[slot] == bucket_sums(chunk[at], BUCKET)[0]
        decoder.advance()
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stripe_decoder_any_k_holders_give_all_other_chunks(data: st.DataObject) -> None:
    k, m = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    counts = tuple(data.draw(st.lists(st.integers(0, 4), min_size=k, max_size=k)))
    if not any(counts):
        counts = (*counts[:-1], 2)
    group, order, chunks = coded(k, m, counts, data.draw(st.integers(0, 9)))
    holders = data.draw(st.permutations(group.members))[:k]
    targets = data.draw(st.lists(st.sampled_from(sorted(set(group.members) - set(holders))), min_size=1, unique=True))
    decoder = StripeDecoder(codec(k, m), group, order, BUCKET, using=holders, targets=targets)
    out = decoded(decoder, chunks, holders[0])
    assert decoder.wrong() is None
    assert all(np.array_equal(out[slot], chunks[slot]) for slot in targets)
    assert decoder.awaited == set()
    for slot in (*targets, *holders):
        assert decoder.digests[slot] == digest(bucket_sums(chunks[slot][: decoder.length(slot) * BUCKET], BUCKET))


@pytest.mark.parametrize("bad", ["data", "parity"])
def test_stripe_decoder_wrong_chunk_of_any_holder_is_found(bad: str) -> None:
    group, order, chunks = coded(2, 2, (3, 2))
    data, parity = group.sources(0), group.parities(0)
    holders = (data[0], parity[1])
    chunks[holders[bad == "parity"]][BUCKET + 5] ^= 1
    lost = (set(data) | set(parity)) - set(holders)
    decoder = StripeDecoder(codec(2, 2), group, order, BUCKET, using=holders, targets=lost)
    decoded(decoder, chunks, -1)
    assert "does not match its digest" in (decoder.wrong() or "")


def test_stripe_decoder_bytes_beyond_a_short_chunk_are_found() -> None:
    group, order, chunks = coded(2, 1, (3, 1))
    (parity,), data = group.parities(0), group.sources(0)
    chunks[parity][2 * BUCKET + 1] ^= 1
    decoder = StripeDecoder(codec(2, 1), group, order, BUCKET, using=(data[0], parity), targets=(data[1],))
    decoded(decoder, chunks, -1)
    assert "is longer than what was written" in (decoder.wrong() or "")


def test_stripe_decoder_takes_k_and_m_buckets_however_long_the_chunks_are() -> None:
    k, m, counts = 3, 2, (200, 190, 0)
    group, order, _ = coded(k, m, counts)
    holders = (group.sources(0)[0], *group.parities(0))
    tracemalloc.start()
    decoder = StripeDecoder(codec(k, m), group, order, BUCKET, using=holders, targets=(group.sources(0)[1],))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken <= (k + m) * BUCKET + 16_384
    assert sum(len(buffer) for buffer in (*decoder._inputs.values(), *decoder.outputs.values())) <= (k + m) * BUCKET
