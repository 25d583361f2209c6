"""How stripes lie on the members of a group, and that any m members may be lost, with the codec on real bytes."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.groups import place
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.protocol.state import Topology
from tests.support.coding import encoded

SIZE = 64


def groups(least: int, largest: int, parity: int = 0) -> st.SearchStrategy[StripeGroup]:
    """A group of slots in any order, with at least `parity` parity chunks in each stripe."""
    sizes = st.integers(least, largest).flatmap(lambda g: st.tuples(st.just(g), st.integers(parity, g - 1)))
    return sizes.flatmap(
        lambda s: st.builds(StripeGroup, st.just(0), st.permutations(range(s[0])).map(tuple), st.just(s[1]))
    )


@given(groups(1, 32))
@settings(deadline=None)
def test_stripes_every_member_holds_one_chunk_of_each(group: StripeGroup) -> None:
    for stripe in range(group.size):
        assert sorted(group.sources(stripe) + group.parities(stripe)) == sorted(group.members)
        assert len(group.sources(stripe)) == group.data
    for slot in group.members:
        assert sorted(group.data_stripes(slot) + group.parity_stripes(slot)) == list(range(group.size))
        assert all(slot in group.sources(stripe) for stripe in group.data_stripes(slot))
        assert all(slot in group.parities(stripe) for stripe in group.parity_stripes(slot))


@given(groups(1, 32))
@settings(deadline=None)
def test_stripes_parity_and_traffic_are_balanced(group: StripeGroup) -> None:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for stripe in range(group.size):
        for source, target in itertools.product(group.sources(stripe), group.parities(stripe)):
            sent[source] += 1
            received[target] += 1
    # In chunks of S / k: m S sent and received by each member, m / k of S held as parity.
    assert all(sent[slot] == received[slot] == group.parity * group.data for slot in group.members)
    assert all(len(group.parity_stripes(slot)) == group.parity for slot in group.members)


@given(groups(2, 16, parity=1))
@settings(deadline=None)
def test_stripes_senders_in_order_load_receivers_evenly(group: StripeGroup) -> None:
    for chunk in range(group.data):
        under_way = [group.data_stripes(slot)[chunk] for slot in group.members]
        arrivals = Counter(target for stripe in under_way for target in group.parities(stripe))
        assert set(arrivals.values()) == {group.parity}


@pytest.mark.parametrize(("nodes", "k", "m"), [(1, 4, 2), (2, 1, 1), (4, 2, 2), (7, 2, 1), (9, 2, 2), (8, 1, 1)])
def test_group_any_m_members_lost_decode_from_the_rest(nodes: int, k: int, m: int) -> None:
    placed = place(nodes, k, m)
    topology = Topology(tuple(StripeGroup(i, group.members, group.m) for i, group in enumerate(placed)))
    assert topology.slots == nodes
    for group in topology.groups:
        codec = Codec(group.data, group.parity)
        rng = np.random.default_rng(nodes)
        states = {slot: rng.integers(0, 256, (group.data, SIZE), np.uint8) for slot in group.members}
        memory: dict[int, dict[int, Bytes]] = {slot: {} for slot in group.members}  # what each member holds, by stripe
        for stripe in range(group.size):
            sources = group.sources(stripe)
            data = [states[slot][group.data_stripes(slot).index(stripe)] for slot in sources]
            chunks = dict(zip(sources + group.parities(stripe), data + encoded(codec, data), strict=True))
            for slot, chunk in chunks.items():
                memory[slot][stripe] = chunk
        for lost in itertools.combinations(group.members, group.parity):
            for stripe in range(group.size):
                order = group.sources(stripe) + group.parities(stripe)
                present = {i: memory[slot][stripe] for i, slot in enumerate(order) if slot not in lost}
                missing = {i: np.empty(SIZE, np.uint8) for i, slot in enumerate(order) if slot in lost}
                codec.decode(present, missing)
                assert all(np.array_equal(chunk, memory[order[i]][stripe]) for i, chunk in missing.items()), lost
