"""Which node takes which slot: against the best of all assignments where these can be tried."""

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from keepwarm.ft.groups import Group, place
from keepwarm.launch.plan.placement import place_nodes, tolerable


def costly(slots: Mapping[str, int], domains: Mapping[str, str], groups: Sequence[Group]) -> int:
    """Domains whose loss takes more nodes of a group than it may lose."""
    node = {slot: name for name, slot in slots.items()}
    held = [Counter(domains[node[slot]] for slot in group.members) for group in groups]
    return len({name for group, each in zip(groups, held, strict=True) for name in each if each[name] > group.m})


def best(nodes: Sequence[str], domains: Mapping[str, str], groups: Sequence[Group]) -> int:
    """The least of `costly` over all assignments. Nodes of a domain are alike, and so are slots of a group."""
    names = [domains[node] for node in nodes]
    count = sum(group.size for group in groups)
    least = len(names)
    for labels in set(itertools.permutations(names, count)):
        left, bad = list(labels), set()
        for group in groups:
            mine = Counter(left[: group.size])
            left = left[group.size :]
            bad |= {name for name in mine if mine[name] > group.m}
        least = min(least, len(bad))
    return least


def drawn(seed: int) -> tuple[list[str], dict[str, str], tuple[Group, ...]]:
    draw = random.Random(seed)
    k, m, spares = draw.randint(1, 3), draw.randint(1, 2), draw.randint(0, 2)
    slots = draw.randint(k + m, 7 - spares)
    nodes = [f"n{i}" for i in range(slots + spares)]
    draw.shuffle(nodes)
    racks = draw.randint(1, 4)
    own = ["a"] * draw.randint(0, 3)  # one of them is larger than the others
    return nodes, {node: draw.choice([*"abcd"[:racks], *own]) for node in nodes}, place(slots, k, m)


@pytest.mark.parametrize("seed", range(60))
def test_placement_drawn_domains_cost_as_little_as_the_best_of_all_assignments(seed: int) -> None:
    nodes, domains, groups = drawn(seed)
    found = place_nodes(nodes, domains, groups)
    count = sum(group.size for group in groups)
    assert sorted(found.slots.values()) == list(range(count))
    assert sorted([*found.slots, *found.spares]) == sorted(nodes)
    assert costly(found.slots, domains, groups) == best(nodes, domains, groups)
    assert sum(cost > 0 for cost in found.costs.values()) == costly(found.slots, domains, groups)


@pytest.mark.parametrize("seed", range(200))
def test_placement_of_many_nodes_spreads_each_domain_evenly_over_groups(seed: int) -> None:
    draw = random.Random(seed)
    k, m = draw.randint(1, 6), draw.randint(1, 3)
    slots, spares = draw.randint(k + m, 300), draw.randint(0, 12)
    groups = place(slots, k, m)
    nodes = [f"n{i}" for i in range(slots + spares)]
    domains = {node: f"rack{draw.randrange(draw.choice((2, 9, 40)))}" for node in nodes}
    found = place_nodes(nodes, domains, groups)
    for name in {*domains.values()}:
        counts = [sum(domains[node] == name for node in members) for members in found.members]
        assert max(counts) <= -(-sum(counts) // len(groups))
    sizes = Counter(domains[node] for node in found.slots)
    assert {name for name, cost in found.costs.items() if cost} == {
        name for name, size in sizes.items() if size > tolerable(groups)
    }


def test_placement_alternating_racks_are_taken_apart_and_lines_say_what_a_rack_costs() -> None:
    nodes = [f"n{i}" for i in range(4)]
    domains = {"n0": "a", "n1": "b", "n2": "a", "n3": "b"}
    found = place_nodes(nodes, domains, place(4, 1, 1))
    assert found.slots == {"n0": 0, "n2": 1, "n1": 2, "n3": 3}
    assert found.costs == {"a": 0, "b": 0}
    assert list(found.lines) == [
        "2 groups of nodes, each with its domain: a domain with up to 2 of the 4 nodes may be lost",
        "  group 0: n0 (a, slot 0), n1 (b, slot 2)",
        "  group 1: n2 (a, slot 1), n3 (b, slot 3)",
        "  the loss of any one domain leaves the memory whole",
    ]
    found = place_nodes(nodes, {"n0": "a", "n1": "a", "n2": "a"}, place(4, 1, 1))
    assert (
        list(found.lines)[-1] == "  the loss of all of a (3 of them) costs the memory: 1 group loses more than it can"
    )


def test_placement_spares_come_from_the_domain_that_is_too_large() -> None:
    domains = {"n0": "a", "n1": "a", "n2": "a", "n3": "b"}
    found = place_nodes(list(domains), domains, place(2, 1, 1))
    assert (found.slots, found.spares) == ({"n0": 0, "n3": 1}, ("n1", "n2"))
    assert list(found.lines)[2] == "  spares: n1 (a), n2 (a)"


def test_placement_without_domains_keeps_the_order_of_the_nodes() -> None:
    nodes = [f"n{i}" for i in range(9)]
    found = place_nodes(nodes, {}, place(8, 2, 1))
    assert list(found.slots) == nodes[:8]
    assert found.spares == ("n8",)


def test_placement_too_few_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 nodes for 3 slots"):
        place_nodes(["a", "b"], {}, place(3, 2, 1))
