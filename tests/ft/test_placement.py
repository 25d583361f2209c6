"""Placement keeps its promise: losing any m nodes of every group loses no byte, with real codes on real bytes."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft.erasure import Codec
from ft.errors import PlacementError
from ft.placement import Holding, chunk_size, place, split_copies, stripes
from ft.survival import loss_probability

small_codes = st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2), (1, 2), (4, 2), (3, 3)])


@st.composite
def clusters(draw, largest=24):
    """A code and the failure domains of enough nodes for it."""
    k, m = draw(small_codes)
    nodes = draw(st.integers(k + m, largest))
    racks = draw(st.integers(1, nodes))
    return draw(st.lists(st.integers(0, racks - 1), min_size=nodes, max_size=nodes)), k, m


@given(clusters(largest=200))
@settings(deadline=None)
def test_every_node_is_protected_in_near_equal_groups(cluster):
    domains, k, m = cluster
    groups = place(domains, k, m)
    assert sorted(node for group in groups for node in group.members) == list(range(len(domains)))
    sizes = {group.size for group in groups}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 32
    assert all(group.m == m and group.protected and group.k >= 1 for group in groups)
    if len(domains) % (k + m) == 0:
        assert sizes == {k + m}
    if len(domains) // (k + m) * 32 >= len(domains):
        assert len(groups) == len(domains) // (k + m)
    assert all(group.domains == tuple(domains[node] for node in group.members) for group in groups)


@given(clusters(largest=60))
@settings(deadline=None)
def test_no_group_holds_more_of_a_domain_than_it_must(cluster):
    domains, k, m = cluster
    groups = place(domains, k, m)
    sizes = Counter(domains)
    for group in groups:
        for domain, held in Counter(group.domains).items():
            assert held <= math.ceil(sizes[domain] / len(groups))
        assert set(group.crowded) == {d for d, held in Counter(group.domains).items() if held > m and held > 1}


def test_groups_stride_over_racks():
    racks = [f"rack {node // 4}" for node in range(16)]  # four racks of four, in the order of the nodes
    groups = place(racks, 3, 1)
    assert [group.members for group in groups] == [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    assert all(not group.crowded for group in groups)
    assert [group.members for group in place(6, 1, 1)] == [(0, 3), (1, 4), (2, 5)]
    # Three nodes of a rack in two pairs: one pair cannot be spread.
    assert [group.crowded for group in place(["a", "a", "a", "b"], 1, 1)] == [("a",), ()]


def test_counts_that_do_not_divide():
    assert [group.size for group in place(11, 3, 1)] == [6, 5]
    assert [group.k for group in place(11, 3, 1)] == [5, 4]
    assert [(group.members, group.k, group.m) for group in place(2, 1, 1)] == [((0, 1), 1, 1)]
    # One group of 39 would not fit the field: two of 20 and 19.
    assert [group.size for group in place(39, 18, 2)] == [20, 19]


def test_one_node_has_no_parity_and_says_so():
    (group,) = place(1, 6, 2)
    assert (group.members, group.k, group.m, group.protected) == ((0,), 1, 0, False)


@pytest.mark.parametrize(
    ("nodes", "k", "m", "message"),
    [
        (3, 3, 1, r"k \+ m = 3 \+ 1 = 4 nodes, there are 3; choose k \+ m <= 3, for example \(2, 1\)"),
        (2, 1, 2, r"there are 2; choose k \+ m <= 2, for example \(1, 1\)"),
        (64, 30, 3, r"k \+ m = 33, at most 32"),
        (1, 30, 3, r"k \+ m = 33, at most 32"),
        (0, 1, 1, "no node"),
        (4, 0, 1, "k >= 1"),
        (4, 1, -1, "m >= 0"),
        (41, 1, 20, "choose m <= 19"),
    ],
)
def test_a_code_that_does_not_fit_is_an_error(nodes, k, m, message):
    with pytest.raises(PlacementError, match=message):
        place(nodes, k, m)


@given(st.integers(1, 32).flatmap(lambda g: st.tuples(st.just(g), st.integers(0, g - 1))))
@settings(deadline=None)
def test_stripes_are_balanced(shape):
    size, m = shape
    k, found = size - m, stripes(size, m)
    assert len(found) == size
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for stripe in found:
        # One chunk per member, so that a lost member is one erasure of every stripe.
        assert sorted([member for member, _ in stripe.sources] + list(stripe.parity)) == list(range(size))
        assert len(stripe.sources) == k
        for (source, _), target in itertools.product(stripe.sources, stripe.parity):
            sent[source] += 1
            received[target] += 1
    # In chunks of S / k: m * S sent and received by each, m / k of S held as parity.
    assert all(sent[member] == received[member] == m * k for member in range(size))
    held = [member for stripe in found for member in stripe.parity]
    assert sorted(held) == sorted(list(range(size)) * m)
    placed = [source for stripe in found for source in stripe.sources]
    assert sorted(placed) == list(itertools.product(range(size), range(k)))


@given(st.integers(2, 16).flatmap(lambda g: st.tuples(st.just(g), st.integers(1, g - 1))))
@settings(deadline=None)
def test_senders_in_order_load_all_receivers_alike(shape):
    size, m = shape
    found = stripes(size, m)
    for chunk in range(size - m):
        arrivals = Counter(p for stripe in found for _, c in stripe.sources if c == chunk for p in stripe.parity)
        assert set(arrivals.values()) == {m}


def test_stripes_refuse_more_parity_than_members():
    with pytest.raises(PlacementError, match="2 nodes cannot hold 2"):
        stripes(2, 2)


def test_chunk_size_covers_the_state():
    assert [chunk_size(n, 3) for n in (0, 1, 3 * 4096, 3 * 4096 + 1)] == [0, 4096, 4096, 8192]
    assert chunk_size(100, 3, alignment=1) == 34


class Cluster:
    """Agents' memories: per node its state, zero-padded and cut into chunks, and the parity it holds for its group."""

    def __init__(self, groups, states):
        self.groups = groups
        self.data, self.parity = {}, {}
        for group in groups:
            size = chunk_size(max(len(states[node]) for node in group.members), group.k, alignment=64)
            for node in group.members:
                padded = np.zeros(size * group.k, np.uint8)
                padded[: len(states[node])] = np.frombuffer(states[node], np.uint8)
                self.data[node] = padded.reshape(group.k, size)
                self.parity[node] = {}
            codec = Codec(group.k, group.m, threads=1)
            for number, stripe in enumerate(stripes(group.size, group.m)):
                parity = [np.zeros(size, np.uint8) for _ in stripe.parity]
                for index, (member, chunk) in enumerate(stripe.sources):
                    codec.update(parity, index, self.data[group.members[member]][chunk])
                for member, buffer in zip(stripe.parity, parity, strict=True):
                    self.parity[group.members[member]][number] = buffer

    def states_after(self, lost):
        """Every node's padded state, decoded without reading anything that a lost node held."""
        states = {node: chunks.copy() for node, chunks in self.data.items() if node not in lost}
        for group in self.groups:
            codec = Codec(group.k, group.m, threads=1)
            for node in set(group.members) & lost:
                states[node] = np.empty_like(self.data[node])
            for number, stripe in enumerate(stripes(group.size, group.m)):
                present, missing = {}, {}
                for index, (member, chunk) in enumerate(stripe.sources):
                    node = group.members[member]
                    (missing if node in lost else present)[index] = states[node][chunk]
                for index, member in enumerate(stripe.parity, start=group.k):
                    if group.members[member] not in lost:
                        present[index] = self.parity[group.members[member]][number]
                codec.decode(present, missing)
        return {node: chunks.tobytes() for node, chunks in states.items()}


def losses_of_m_in_every_group(groups):
    return (
        set(itertools.chain(*lost))
        for lost in itertools.product(*(itertools.combinations(group.members, group.m) for group in groups))
    )


@pytest.mark.parametrize(("nodes", "k", "m"), [(2, 1, 1), (4, 2, 2), (4, 3, 1), (7, 2, 1), (9, 2, 2), (8, 1, 1)])
def test_losing_any_m_of_every_group_loses_nothing(nodes, k, m):
    random = np.random.default_rng(nodes)
    states = [random.bytes(300 + 37 * node) for node in range(nodes)]
    cluster = Cluster(place(nodes, k, m), states)
    for lost in losses_of_m_in_every_group(cluster.groups):
        restored = cluster.states_after(lost)
        assert all(restored[node].startswith(state) for node, state in enumerate(states)), lost


@st.composite
def replicated(draw):
    """A cluster and the shards that its nodes hold alike."""
    domains, k, m = draw(clusters(largest=9))
    nodes = st.sets(st.integers(0, len(domains) - 1), min_size=1)
    shapes = draw(st.lists(st.tuples(st.integers(0, 700), nodes), min_size=1, max_size=6))
    holdings = [Holding(name=f"shard {i}", nbytes=n, nodes=tuple(held)) for i, (n, held) in enumerate(shapes)]
    return place(domains, k, m), holdings, draw(st.sampled_from([0, 200, 1000]))


@given(replicated(), st.data())
@settings(max_examples=100, deadline=None)
def test_split_copies_survive_the_same_losses(case, draw):
    groups, holdings, whole_below = case
    contents = {shard.name: np.random.default_rng(i).bytes(shard.nbytes) for i, shard in enumerate(holdings)}
    copies = split_copies(holdings, groups, whole_below=whole_below)

    states = {node: b"" for group in groups for node in group.members}
    where = defaultdict(list)
    for copy in copies:
        if copy.coded:
            where[copy.name].append((copy, len(states[copy.node])))
            states[copy.node] += contents[copy.name][copy.start : copy.stop]
    cluster = Cluster(groups, states)
    lost = {
        node
        for group in groups
        for node in draw.draw(st.sets(st.sampled_from(group.members), min_size=group.m, max_size=group.m))
    }
    restored = cluster.states_after(lost)

    for shard in holdings:
        uncoded = [copy for copy in copies if copy.name == shard.name and not copy.coded]
        if uncoded:
            assert not where[shard.name]
            assert all((copy.start, copy.stop) == (0, shard.nbytes) for copy in uncoded)
            assert any(copy.node not in lost for copy in uncoded)
            continue
        found = bytearray(shard.nbytes)
        written = 0
        for copy, at in where[shard.name]:
            length = copy.stop - copy.start
            found[copy.start : copy.stop] = restored[copy.node][at : at + length]
            written += length
        assert written == shard.nbytes  # each byte is copied once
        assert bytes(found) == contents[shard.name]


@given(replicated())
@settings(max_examples=100, deadline=None)
def test_who_copies_what(case):
    groups, holdings, whole_below = case
    of_node = {
        node: (group, domain) for group in groups for node, domain in zip(group.members, group.domains, strict=True)
    }
    copies = split_copies(holdings, groups, whole_below=whole_below)
    for shard in holdings:
        mine = [copy for copy in copies if copy.name == shard.name]
        assert {copy.node for copy in mine} <= set(shard.nodes)
        if any(not copy.coded for copy in mine):
            (group,) = {of_node[copy.node][0] for copy in mine}
            assert shard.nbytes < whole_below
            assert len({of_node[copy.node][1] for copy in mine}) == len(mine) == group.m + 1
        elif len(set(shard.nodes)) > 1:
            lengths = [copy.stop - copy.start for copy in mine]
            assert max(lengths, default=0) <= math.ceil(shard.nbytes / len(shard.nodes) / 64) * 64
            assert all(copy.start % 64 == 0 for copy in mine)


def test_replicas_split_alike_and_small_ones_stay_whole():
    groups = place(["a", "b", "c", "d"], 1, 1)  # (0, 2) and (1, 3)
    big = Holding(name="weights", nbytes=4096, nodes=(0, 1, 2, 3))
    small = Holding(name="step", nbytes=8, nodes=(0, 1, 2, 3))
    scattered = Holding(name="bias", nbytes=8, nodes=(0, 1))  # two domains, but two groups: must be coded
    copies = split_copies([big, small, scattered], groups, whole_below=1024)
    assert [(c.name, c.start, c.stop, c.node, c.coded) for c in copies] == [
        ("weights", 0, 1024, 0, True),
        ("weights", 1024, 2048, 1, True),
        ("weights", 2048, 3072, 2, True),
        ("weights", 3072, 4096, 3, True),
        ("step", 0, 8, 0, False),
        ("step", 0, 8, 2, False),
        ("bias", 0, 8, 1, True),
    ]


def test_one_node_alone_codes_nothing():
    copies = split_copies([Holding(name="weights", nbytes=100_000, nodes=(0,))], place(1, 6, 2))
    assert [(c.start, c.stop, c.coded) for c in copies] == [(0, 100_000, False)]


@pytest.mark.parametrize(("nodes", "message"), [((), "no node holds w"), ((0, 9), "node 9, which is in no group")])
def test_a_shard_without_a_place_is_an_error(nodes, message):
    with pytest.raises(PlacementError, match=message):
        split_copies([Holding(name="w", nbytes=1, nodes=nodes)], place(4, 1, 1))


def test_loss_probability_counts_every_set():
    for nodes, k, m in ((7, 2, 1), (9, 2, 2), (6, 1, 1)):
        groups = place(nodes, k, m)
        for failures in range(nodes + 1):
            sets = list(itertools.combinations(range(nodes), failures))
            fatal = sum(any(len(set(group.members) & set(lost)) > m for group in groups) for lost in sets)
            assert loss_probability(groups, failures) == pytest.approx(fatal / len(sets), rel=1e-12)
    with pytest.raises(ValueError, match="5 of 4"):
        loss_probability(place(4, 1, 1), 5)


@pytest.mark.parametrize(
    ("k", "m", "published"),
    [
        (1, 1, (7.9e-3, 2.4e-2, 9.8e-4, 2.9e-3)),  # two replicas
        (7, 1, (5.5e-2, 0.16, 6.8e-3, 2.0e-2)),  # XOR over eight
        (6, 2, (0, 2.6e-3, 0, 4.0e-5)),
        (8, 2, (0, 5.1e-3, 0, 6.9e-5)),
        (13, 3, (0, 0, 0, 0)),
    ],
)
def test_the_arithmetic_of_survival(k, m, published):
    cases = [(nodes, failures) for nodes in (128, 1024) for failures in (2, 3)]
    computed = [loss_probability(place(nodes, k, m), failures) for nodes, failures in cases]
    assert computed == pytest.approx(published, rel=0.04)
