"""Which node takes which slot, so that the loss of a whole failure domain costs as few groups as possible. Pure.

A failure domain is what fails at once, as a rack or a switch. A group of nodes that protect each other survives the
loss of any m of them. Nodes of a domain take slots that lie one after the other in the order in which slots are dealt
to groups, so that no group gets more of them than it must; in this order they are neighbours in the layout, too.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from keepwarm.ft.groups import Group, groups_of
from keepwarm.text import counted
from keepwarm.trainer.job.slurm.hostlist import expand
from keepwarm.trainer.job.spec import JobSpec

SHOWN = 8
"""Groups to show in full."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The nodes of a start."""

    slots: Mapping[str, int]
    """Slot of each node that has one, by slot."""
    spares: tuple[str, ...]
    domains: Mapping[str, str]
    """Domain of each node."""
    groups: tuple[Group, ...]
    """Members are slots."""

    @property
    def members(self) -> list[list[str]]:
        """Return the nodes of each group."""
        nodes = {slot: node for node, slot in self.slots.items()}
        return [[nodes[slot] for slot in group.members] for group in self.groups]

    def data(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "groups": self.members,
            "slots": dict(self.slots),
            "spares": self.spares,
            "domains": dict(self.domains),
            "groups_lost_with": self.costs,
        }

    @property
    def lines(self) -> Iterator[str]:
        """Yield what a user is to know of it."""
        slots = len(self.slots)
        yield (
            f"{counted(len(self.groups), 'group')} of nodes, each with its domain: a domain with up to "
            f"{tolerable(self.groups)} of the {slots} nodes may be lost"
        )
        for number, nodes in list(enumerate(self.members))[:SHOWN]:
            named = (f"{node} ({self.domains[node]}, slot {self.slots[node]})" for node in nodes)
            yield f"  group {number}: {', '.join(named)}"
        if len(self.groups) > SHOWN:
            yield f"  and {len(self.groups) - SHOWN} more"
        if self.spares:
            yield f"  spares: {', '.join(f'{node} ({self.domains[node]})' for node in self.spares)}"
        costly = {domain: count for domain, count in self.costs.items() if count}
        for domain, count in costly.items():
            lost = "1 group loses" if count == 1 else f"{count} groups lose"
            held = sum(self.domains[node] == domain for node in self.slots)
            yield f"  the loss of all of {domain} ({held} of them) costs the memory: {lost} more than it can"
        if not costly:
            yield "  the loss of any one domain leaves the memory whole"

    @property
    def costs(self) -> dict[str, int]:
        """Return how many groups lose more nodes than they can with a whole domain, for each domain with a slot.

        The snapshots in memory are lost if there is one.
        """
        found = dict.fromkeys((self.domains[node] for node in self.slots), 0)
        for group, nodes in zip(self.groups, self.members, strict=True):
            for domain, count in Counter(self.domains[node] for node in nodes).items():
                found[domain] += count > group.m
        return found


def is_placed(job: JobSpec) -> bool:
    """Return whether failure domains decide which node takes which slot."""
    return (
        job.snapshot != "off"
        and job.cluster.slurm.launcher == "node"
        and job.cluster.slurm.failure_domains not in (None, {})
        and job.layout.nodes > 1
    )


def place_job(job: JobSpec, nodes: Sequence[str], domains: Mapping[str, str]) -> Placement:
    """Return the placement of a job with snapshots. Raises as `place_nodes`."""
    assert job.snapshot != "off"
    return place_nodes(nodes, domains, groups_of(job.layout.nodes, job.snapshot))


def expected(job: JobSpec) -> Placement:
    """Return the placement if the job gets the nodes that it names, those of `nodelist` first."""
    slurm, needed = job.cluster.slurm, job.layout.nodes + job.cluster.slurm.spares
    excluded = {*expand(slurm.exclude)}
    named = dict.fromkeys((*expand(slurm.nodelist), *slurm.domain_of_node))
    nodes = [node for node in named if node not in excluded][:needed]
    nodes += [f"another node {number}" for number in range(1, needed - len(nodes) + 1)]
    return place_job(job, nodes, slurm.domain_of_node)


def place_nodes(nodes: Sequence[str], domains: Mapping[str, str], groups: Sequence[Group]) -> Placement:
    """Assign nodes to all slots of the groups; the rest are spares. A node without a domain is one of its own.

    As few domains as possible hold more nodes of a group than it may lose. Of two domains that are equally good to take
    a spare from, it is the larger one, and in it the last node.

    Raises ValueError if there are fewer nodes than slots.
    """
    order = _dealt(groups)
    own = {node: domains.get(node, node) for node in nodes}
    by_domain: dict[str, list[str]] = {}
    for node in nodes:
        by_domain.setdefault(own[node], []).append(node)
    spares = len(nodes) - len(order)
    if spares < 0:
        raise ValueError(f"{len(nodes)} nodes for {len(order)} slots")
    used = _used({name: len(each) for name, each in by_domain.items()}, spares, tolerable(groups))
    chosen = [node for name, each in by_domain.items() for node in each[: used[name]]]
    slots, taken = sorted(zip(order, chosen, strict=True)), {*chosen}
    return Placement(
        slots={node: slot for slot, node in slots},
        spares=tuple(node for node in nodes if node not in taken),
        domains=own,
        groups=tuple(groups),
    )


def tolerable(groups: Sequence[Group]) -> int:
    """Return how many nodes a domain may hold without any group losing more than it can."""
    return sum(group.m for group in groups)


def _dealt(groups: Sequence[Group]) -> list[int]:
    """Return the slots in turns of the groups: any run of them has nearly as many in one group as in another."""
    by_size = sorted(groups, key=lambda group: -group.size)
    return [group.members[turn] for turn in range(by_size[0].size) for group in by_size if turn < group.size]


def _used(sizes: Mapping[str, int], spares: int, most: int) -> dict[str, int]:
    """Return how many nodes of each domain get slots."""
    used = dict(sizes)
    for name in sorted(sizes, key=lambda name: sizes[name]):
        excess = sizes[name] - most
        if 0 < excess <= spares:
            used[name], spares = most, spares - excess
    for _ in range(spares):
        # The last of the largest: nodes are taken in the order of the batch system, which has neighbours together.
        largest = max(reversed(used), key=lambda name: used[name])
        used[largest] -= 1
    return used
