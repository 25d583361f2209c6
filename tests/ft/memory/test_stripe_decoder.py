"""A stripe decoded bucket by bucket gives what it was coded from, in bounded memory, or says that it is wrong."""

import functools
import tracemalloc

import numpy as np
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


def buckets(group: StripeGroup) -> dict[int, Bytes]:
    return {slot: np.full(BUCKET, 255, np.uint8) for slot in group.members}


def decoded(decoder: StripeDecoder, chunks: dict[int, Bytes], mine: int) -> dict[int, Bytes]:
    """The chunks that are computed, from holders of which one is in this process and the others send."""
    out = {slot: np.zeros(decoder.buckets * BUCKET, np.uint8) for slot in decoder.outputs}
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
        if decoder.last:
            claim(decoder, chunks)
        decoder.advance()
    return out


def claim(decoder: StripeDecoder, chunks: dict[int, Bytes], zeros: int = 2) -> None:
    """Holders of parity say what they hold, which ends with buckets of zeros."""
    for slot in decoder.using:
        whole = np.concatenate([chunks[slot], np.zeros(zeros * BUCKET, np.uint8)])
        decoder.claims[slot] = digest(bucket_sums(whole, BUCKET)), len(whole) // BUCKET


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
    decoder = StripeDecoder(codec(k, m), group, order, buckets(group), using=holders, wanted=targets)
    out = decoded(decoder, chunks, holders[0])
    assert decoder.damaged() is None
    assert decoder.mismatch() is None
    assert all(np.array_equal(out[slot], chunks[slot]) for slot in targets)
    assert decoder.awaited == set()
    for slot in (*targets, *holders):
        assert decoder.digests[slot] == digest(bucket_sums(chunks[slot][: decoder.length(slot) * BUCKET], BUCKET))


def test_stripe_decoder_data_other_than_recorded_is_damaged() -> None:
    group, order, chunks = coded(2, 2, (3, 2))
    holders = (group.sources(0)[0], group.parities(0)[1])
    chunks[holders[0]][BUCKET + 5] ^= 1
    decoder = StripeDecoder(codec(2, 2), group, order, buckets(group), using=holders, wanted=())
    decoded(decoder, chunks, -1)
    assert decoder.damaged() == holders[0]


def test_stripe_decoder_parity_other_than_its_holder_says_is_damaged() -> None:
    group, order, chunks = coded(2, 2, (3, 2))
    holders = (group.sources(0)[0], group.parities(0)[1])
    decoder = StripeDecoder(codec(2, 2), group, order, buckets(group), using=holders, wanted=())
    decoded(decoder, chunks, -1)
    assert decoder.damaged() is None
    decoder.claims[holders[1]] = decoder.claims[holders[1]][0] ^ 1, 5
    assert decoder.damaged() == holders[1]


def test_stripe_decoder_wrong_parity_that_matches_its_digest_is_a_mismatch() -> None:
    group, order, chunks = coded(2, 2, (3, 2))
    lost, holders = group.sources(0)[1], (group.sources(0)[0], group.parities(0)[1])
    chunks[holders[1]][BUCKET + 5] ^= 1
    decoder = StripeDecoder(codec(2, 2), group, order, buckets(group), using=holders, wanted=())
    decoded(decoder, chunks, -1)
    assert decoder.damaged() is None
    assert decoder.mismatch() == lost


def test_stripe_decoder_bytes_beyond_a_short_chunk_are_a_mismatch() -> None:
    group, order, chunks = coded(2, 1, (3, 1))
    (parity,), data = group.parities(0), group.sources(0)
    chunks[parity][2 * BUCKET + 1] ^= 1
    decoder = StripeDecoder(codec(2, 1), group, order, buckets(group), using=(data[0], parity), wanted=(data[1],))
    decoded(decoder, chunks, -1)
    assert decoder.damaged() is None
    assert decoder.mismatch() == data[1]


def test_stripe_decoder_takes_no_memory_however_long_the_chunks_are() -> None:
    k, m, counts = 3, 2, (200, 190, 0)
    group, order, chunks = coded(k, m, counts)
    holders, memory = (group.sources(0)[0], *group.parities(0)), buckets(group)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    decoder = StripeDecoder(codec(k, m), group, order, memory, using=holders, wanted=())
    for _ in range(100):
        for slot in sorted(decoder.awaited):
            decoder.copy(slot, chunks[slot])
        decoder.decode()
        decoder.advance()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before <= 16 * BUCKET  # what NumPy needs for one bucket
