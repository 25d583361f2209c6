"""Assign nodes to protection groups across failure domains. Pure and torch-free.

Nodes are numbered 0..N-1. A failure domain is anything that fails as a unit: a rack, a switch or the node itself. A
group of g nodes under a code with m parity chunks survives the loss of any m of them, and g = k + m. For the placement
of stripes within a group, see `keepwarm.ft.protocol.parity_placement.StripeGroup`.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from keepwarm.ft.errors import PlacementError
from keepwarm.ft.spec import CodeSpec, SnapshotSpec

MAX_GROUP = 32
MAX_BUCKETS = 262_144
"""Buckets of a node's state: their checksums fit into one message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Nodes that hold parity for each other. A node's position in `members` is its number within the group."""

    members: tuple[int, ...]
    domains: tuple[Hashable, ...]
    """Failure domain of each member."""
    m: int
    """Members that may be lost at once. 0 means no parity, and the caller warns."""

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def k(self) -> int:
        """Chunks per member's state, and sources per stripe."""
        return self.size - self.m

    @property
    def protected(self) -> bool:
        return self.m > 0

    @property
    def crowded(self) -> tuple[Hashable, ...]:
        """Multi-node domains with more than m members here. Losing one loses data, so the caller warns."""
        counts = Counter(self.domains)
        return tuple(domain for domain, count in counts.items() if count > max(self.m, 1))


def place(nodes: int | Sequence[Hashable], k: int, m: int) -> tuple[Group, ...]:
    """Divide nodes, given as a count or as each node's failure domain, into groups for the code (k, m).

    N nodes form N div (k + m) groups whose sizes differ by at most one, so that no node is left without parity; a
    group of g' nodes uses the code (g' - m, m). If this would exceed 32 nodes, there are more and smaller groups. The
    members of each domain are dealt to the groups in turn, so that no group holds more than ceil(d / groups) of a
    domain of d nodes, which is the least possible. A single node becomes a group without parity.

    Raises:
        PlacementError: if k < 1, m < 0, k + m > 32, there is no node, or there are several but fewer than k + m.
    """
    domains: Sequence[Hashable] = range(nodes) if isinstance(nodes, int) else nodes
    count, width = len(domains), k + m
    if k < 1 or m < 0:
        raise PlacementError(f"code ({k}, {m}): needs k >= 1 data and m >= 0 parity chunks")
    if width > MAX_GROUP:
        raise PlacementError(f"code ({k}, {m}): k + m = {width}, at most {MAX_GROUP} are possible; choose a smaller k")
    if count < 1:
        raise PlacementError("there is no node to place")
    if count == 1:
        return (Group(members=(0,), domains=(domains[0],), m=0),)
    if count < width:
        raise PlacementError(
            f"code ({k}, {m}) needs groups of k + m = {k} + {m} = {width} nodes, there are {count}; "
            f"choose k + m <= {count}, for example ({max(count - m, 1)}, {min(m, count - 1)})"
        )
    groups = max(count // width, -(-count // MAX_GROUP))
    if count // groups <= m:
        raise PlacementError(
            f"code ({k}, {m}): {count} nodes are too many for one group of at most {MAX_GROUP} and leave "
            f"{count // groups} nodes in each of {groups}, not more than m = {m}; choose m <= {count // groups - 1}"
        )
    first_seen: dict[Hashable, int] = {}
    for domain in domains:
        first_seen.setdefault(domain, len(first_seen))
    by_domain = sorted(range(count), key=lambda node: first_seen[domains[node]])
    dealt = (sorted(by_domain[group::groups]) for group in range(groups))
    return tuple(
        Group(members=tuple(members), domains=tuple(domains[node] for node in members), m=m) for members in dealt
    )


def code_for(nodes: int, code: CodeSpec | None) -> tuple[int, int]:
    """Return (k, m). Values missing from the spec start at (4, 2) and shrink until a group fits, m last."""
    code = code or CodeSpec()
    parity = code.parity or (2 if nodes >= 4 else 1)
    return code.data or max(1, min(4, nodes - parity)), parity


def groups_of(nodes: int, spec: SnapshotSpec) -> tuple[Group, ...]:
    """Return the groups of nodes that protect each other.

    Raises:
        PlacementError: if the code does not fit the nodes.
    """
    domains = list(spec.domains) if isinstance(spec.domains, tuple) else nodes
    return place(domains, *code_for(nodes, spec.code))


def check_bucket(state_bytes: int, bucket: int) -> None:
    """Raise `PlacementError` if a node's state has so many buckets that a snapshot of it could not be restored."""
    count = -(-state_bytes // bucket)
    if count > MAX_BUCKETS:
        least = -(-state_bytes // MAX_BUCKETS)
        raise PlacementError(
            f"snapshot.bucket = {bucket}: the state of a node has {state_bytes} bytes, which are {count} buckets, and "
            f"at most {MAX_BUCKETS} are possible; choose a bucket of at least {-(-least // 4096) * 4096}"
        )
