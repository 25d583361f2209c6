"""Which nodes form groups, how domains spread over them, and what that says about survival."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.ft.errors import PlacementError
from keepwarm.ft.groups import groups_of, place
from keepwarm.ft.spec import CodeSpec, SnapshotSpec
from keepwarm.ft.survival import loss_probability

small_codes = st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2), (1, 2), (4, 2), (3, 3)])


@st.composite
def clusters(draw: st.DrawFn, largest: int = 24) -> tuple[list[int], int, int]:
    """A code and the failure domains of enough nodes for it."""
    k, m = draw(small_codes)
    nodes = draw(st.integers(k + m, largest))
    racks = draw(st.integers(1, nodes))
    return draw(st.lists(st.integers(0, racks - 1), min_size=nodes, max_size=nodes)), k, m


@given(clusters(largest=200))
@settings(deadline=None)
def test_place_every_node_is_in_a_group_of_near_equal_size(cluster: tuple[list[int], int, int]) -> None:
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
def test_place_domains_are_spread_as_far_as_possible(cluster: tuple[list[int], int, int]) -> None:
    domains, k, m = cluster
    groups = place(domains, k, m)
    sizes = Counter(domains)
    for group in groups:
        for domain, held in Counter(group.domains).items():
            assert held <= math.ceil(sizes[domain] / len(groups))
        assert set(group.crowded) == {d for d, held in Counter(group.domains).items() if held > m and held > 1}


def test_place_groups_stride_over_racks() -> None:
    racks = [f"rack {node // 4}" for node in range(16)]  # four racks of four, in the order of the nodes
    groups = place(racks, 3, 1)
    assert [group.members for group in groups] == [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    assert all(not group.crowded for group in groups)
    assert [group.members for group in place(6, 1, 1)] == [(0, 3), (1, 4), (2, 5)]
    # Three nodes of a rack in two pairs: one pair cannot be spread.
    assert [group.crowded for group in place(["a", "a", "a", "b"], 1, 1)] == [("a",), ()]


def test_place_counts_that_do_not_divide_give_uneven_groups() -> None:
    assert [group.size for group in place(11, 3, 1)] == [6, 5]
    assert [group.k for group in place(11, 3, 1)] == [5, 4]
    assert [(group.members, group.k, group.m) for group in place(2, 1, 1)] == [((0, 1), 1, 1)]
    # One group of 39 would not fit the field: two of 20 and 19.
    assert [group.size for group in place(39, 18, 2)] == [20, 19]


def test_place_single_node_is_unprotected() -> None:
    (group,) = place(1, 6, 2)
    assert (group.members, group.k, group.m, group.protected) == ((0,), 1, 0, False)


@pytest.mark.parametrize(
    ("nodes", "code", "expected"),
    [
        (2, None, (1, 1)),
        (3, None, (2, 1)),
        (5, None, (3, 2)),
        (6, None, (4, 2)),
        (6, CodeSpec(parity=1), (5, 1)),
        (3, CodeSpec(data=2), (2, 1)),
        (8, CodeSpec(data=6), (6, 2)),
        (4, CodeSpec(kernel="numpy"), (2, 2)),
        (4, CodeSpec(data=3, parity=1), (3, 1)),
    ],
)
def test_code_open_numbers_follow_from_nodes(nodes: int, code: CodeSpec | None, expected: tuple[int, int]) -> None:
    (group,) = groups_of(nodes, SnapshotSpec(code=code))
    assert (group.k, group.m) == expected


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
def test_place_code_that_does_not_fit_is_refused(nodes: int, k: int, m: int, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        place(nodes, k, m)


def test_loss_probability_equals_enumeration() -> None:
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
def test_loss_probability_matches_published_numbers(k: int, m: int, published: tuple[float, ...]) -> None:
    cases = [(nodes, failures) for nodes in (128, 1024) for failures in (2, 3)]
    computed = [loss_probability(place(nodes, k, m), failures) for nodes, failures in cases]
    assert computed == pytest.approx(published, rel=0.04)
