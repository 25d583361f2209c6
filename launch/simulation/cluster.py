"""Simulated cluster: nodes in racks, and groups of nodes that protect each other."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keepwarm.ft.errors import PlacementError
from keepwarm.ft.groups import Group, place
from keepwarm.launch.errors import SimulationError

Placement = Literal["spread", "adjacent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes 0..N-1; node i is in rack i div `rack`. Spares are additional and in other racks."""

    nodes: int
    gpus_per_node: int = 8
    rack: int = 8
    """Nodes per rack, which a rack failure takes down together."""
    spares: int = 0
    repair: float = 86400.0
    """Seconds from a node's failure until it returns as a spare; `inf` for never."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def rack_of(self, node: int) -> range:
        first = node // self.rack * self.rack
        return range(first, min(first + self.rack, self.nodes))


def form_groups(cluster: Cluster, k: int, m: int, placement: Placement = "spread") -> tuple[Group, ...]:
    """Form groups of the code (k, m): `spread` over racks as by `keepwarm.ft.groups.place`, or of `adjacent` nodes.

    Raises:
        SimulationError: the code does not fit the number of nodes.
    """
    racks = [node // cluster.rack for node in range(cluster.nodes)]
    try:
        spread = place(racks, k, m)
    except PlacementError as error:
        raise SimulationError(str(error)) from error
    if placement == "spread":
        return spread
    groups, first = [], 0
    for size in (group.size for group in spread):
        members = tuple(range(first, first + size))
        groups.append(Group(members=members, domains=tuple(racks[node] for node in members), m=spread[0].m))
        first += size
    return tuple(groups)


def group_numbers(groups: tuple[Group, ...]) -> NDArray[np.int64]:
    """Return the group number of each node, indexed by node."""
    numbers = np.empty(sum(group.size for group in groups), dtype=np.int64)
    for number, group in enumerate(groups):
        numbers[list(group.members)] = number
    return numbers
