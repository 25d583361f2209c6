"""Which node protects which: groups, the stripes inside a group, and who copies what. Pure and torch-free.

Nodes are numbered 0..N-1. A failure domain is whatever fails at once: a rack, a switch, or the node itself. A group
of g nodes under a code with m parity chunks survives the loss of any m of them, and g = k + m.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ft.errors import PlacementError
from ft.spec import CodeSpec, SnapshotSpec

MAX_GROUP = 32

# A piece of a shard starts at a multiple of this, so that it never cuts an element or a cache line.
PIECE_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Nodes that hold parity for each other; a node's position in `members` is its number within the group."""

    members: tuple[int, ...]
    domains: tuple[Hashable, ...]
    """Failure domain of each member."""
    m: int
    """Members that may be lost at once; 0 means that there is no parity and the caller warns."""

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def k(self) -> int:
        """Chunks that a member's state is split into, and sources per stripe."""
        return self.size - self.m

    @property
    def protected(self) -> bool:
        return self.m > 0

    @property
    def crowded(self) -> tuple[Hashable, ...]:
        """Domains of several nodes that hold more than m members: losing one of them loses data; the caller warns."""
        counts = Counter(self.domains)
        return tuple(domain for domain, count in counts.items() if count > max(self.m, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stripe:
    """One codeword of a group. Members are numbered within the group."""

    sources: tuple[tuple[int, int], ...]
    """(member, which of its k chunks), in the order of the code's data chunks 0..k-1."""
    parity: tuple[int, ...]
    """Members that hold parity chunks k..k+m-1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """Bytes of one shard that several nodes hold alike."""

    name: str
    nbytes: int
    nodes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Bytes [start, stop) of a shard that one node copies into its snapshot."""

    name: str
    start: int
    stop: int
    node: int
    coded: bool
    """False where parity is omitted: m + 1 nodes of one group store the same bytes, or the group has no parity."""


def place(nodes: int | Sequence[Hashable], k: int, m: int) -> tuple[Group, ...]:
    """Divides nodes, given as their number or as each one's failure domain, into groups for the code (k, m).

    N nodes form N div (k + m) groups whose sizes differ by at most one, so that no node is left without parity; a
    group of g' nodes is coded (g' - m, m). Where this would exceed 32 nodes, there are more and smaller groups. The
    members of each domain are dealt over the groups in turn, so that no group holds more than ceil(d / groups) of a
    domain of d nodes, which is the least possible. A single node becomes a group without parity.

    Raises:
        PlacementError: k < 1, m < 0, k + m > 32, no node, or fewer than k + m nodes where there are several.
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


def code_for(nodes: int, code: CodeSpec | None) -> CodeSpec:
    """The code of a spec, or (4, 2) made smaller until a group of it fits the nodes, parity last."""
    if code is not None:
        return code
    parity = 2 if nodes >= 4 else 1
    return CodeSpec(data=max(1, min(4, nodes - parity)), parity=parity)


def groups_of(nodes: int, spec: SnapshotSpec) -> tuple[Group, ...]:
    """Which nodes protect each other.

    Raises:
        PlacementError: the code does not fit the nodes.
    """
    code = code_for(nodes, spec.code)
    domains = list(spec.domains) if isinstance(spec.domains, tuple) else nodes
    return place(domains, code.data, code.parity)


def stripes(group_size: int, m: int) -> tuple[Stripe, ...]:
    """The g stripes of a group of g nodes: parity rotates as in RAID-6 (Chen et al., 1994, section 3).

    Parity of stripe t lies on members t..t+m-1 (mod g). Member i gives its chunk c, of k = g - m, to stripe i + 1 + c
    (mod g). With S the bytes of the largest member state, every member holds m chunks of S / k as parity, and sends
    and receives m * S. Chunk c of every member belongs to another stripe, so members that work through their chunks in
    order load all receivers alike, each by m senders at a time.

    Raises:
        PlacementError: not 0 <= m < group_size.
    """
    if not 0 <= m < group_size:
        raise PlacementError(f"a group of {group_size} nodes cannot hold {m} parity chunks per stripe")
    k = group_size - m
    return tuple(
        Stripe(
            sources=tuple(
                (member, chunk) for member in range(group_size) if (chunk := (stripe - member - 1) % group_size) < k
            ),
            parity=tuple((stripe + offset) % group_size for offset in range(m)),
        )
        for stripe in range(group_size)
    )


def chunk_size(state_bytes: int, k: int, *, alignment: int = 4096) -> int:
    """Bytes of each chunk in a group whose largest member state has `state_bytes`: S / k rounded up to `alignment`.

    Smaller states end in zeros.
    """
    return -(-state_bytes // (k * alignment)) * alignment


def split_copies(
    holdings: Iterable[Holding], groups: Sequence[Group], *, whole_below: int = 1 << 16
) -> tuple[Copy, ...]:
    """Who copies which bytes of shards that data-parallel replicas hold alike.

    A shard is cut into near-equal pieces over its holders, each coded by its holder's group. A shard of fewer than
    `whole_below` bytes is instead stored whole, without parity, by m + 1 holders, where m + 1 of them lie in one
    group and in distinct failure domains. In one group, because codes promise survival of m losses in every group
    at once: one copy in each of m + 1 groups would all be gone. Longer pieces go to whoever copies least so far.

    Raises:
        PlacementError: a shard without holders, or held by a node of no group.
    """
    home = {
        node: (index, domain)
        for index, group in enumerate(groups)
        for node, domain in zip(group.members, group.domains, strict=True)
    }
    load = dict.fromkeys(home, 0)
    copies: list[Copy] = []
    for shard in holdings:
        if not shard.nodes:
            raise PlacementError(f"no node holds {shard.name}")
        if strangers := sorted(set(shard.nodes) - home.keys()):
            raise PlacementError(f"{shard.name} is held by node {strangers[0]}, which is in no group")
        holders = sorted(set(shard.nodes), key=lambda node: (load[node], node))
        keepers = _keepers(holders, groups, home) if shard.nbytes < whole_below else ()
        if keepers:
            ranges = [(node, 0, shard.nbytes) for node in keepers]
        else:
            cuts = _cuts(shard.nbytes, len(holders))
            ranges = list(zip(holders, cuts[:-1], cuts[1:], strict=True))
        chosen = [
            Copy(
                name=shard.name,
                start=start,
                stop=stop,
                node=node,
                coded=not keepers and groups[home[node][0]].protected,
            )
            for node, start, stop in ranges
            if stop > start
        ]
        for copy in chosen:
            load[copy.node] += copy.stop - copy.start
        copies.extend(chosen)
    return tuple(copies)


def _keepers(
    holders: Sequence[int], groups: Sequence[Group], home: Mapping[int, tuple[int, Hashable]]
) -> tuple[int, ...]:
    """The first m + 1 holders of one protected group in distinct domains; none if no group has as many."""
    found: defaultdict[int, dict[Hashable, int]] = defaultdict(dict)
    for node in holders:
        group, domain = home[node]
        found[group].setdefault(domain, node)
        if groups[group].protected and len(found[group]) > groups[group].m:
            return tuple(found[group].values())
    return ()


def _cuts(nbytes: int, pieces: int) -> list[int]:
    """`pieces` + 1 positions from 0 to `nbytes`, the inner ones aligned, longer pieces first."""
    short, longer = divmod(-(-nbytes // PIECE_ALIGNMENT), pieces)
    units = itertools.accumulate((short + (piece < longer) for piece in range(pieces)), initial=0)
    return [min(unit * PIECE_ALIGNMENT, nbytes) for unit in units]
