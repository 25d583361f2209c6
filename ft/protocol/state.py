"""What one agent knows, as immutable values: groups and stripes, the copies in its buffers, its peers' facts.

Nothing here does I/O. Mappings are never changed in place; `keepwarm.ft.protocol.step.step` returns new values.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from keepwarm.ft.protocol.messages import ChunkRecord, SnapshotId


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that protect each other with `parity` (m) chunks in each of their `size` stripes, one stripe per member.

    Parity rotates as in RAID-6 (Chen et al., 1994, section 3): row r of stripe t lies on `members[(t + r) % size]`; the
    other k = size - m members, in order of their place in `members`, hold the data chunks of columns 0 ... k-1. So
    every member holds one chunk of every stripe, data in k of them and parity in m, and any m members may be lost. With
    S the bytes of the largest member state, each member holds m S / k of parity and sends and receives m S.
    """

    index: int
    members: tuple[int, ...]
    parity: int

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def data(self) -> int:
        """k, the data chunks of a stripe and of a member."""
        return len(self.members) - self.parity

    def parities(self, stripe: int) -> tuple[int, ...]:
        """Slots that hold the stripe's parity, in order of row."""
        return tuple(self.members[(stripe + row) % self.size] for row in range(self.parity))

    def sources(self, stripe: int) -> tuple[int, ...]:
        """Slots that hold the stripe's data, in order of column."""
        parities = self.parities(stripe)
        return tuple(slot for slot in self.members if slot not in parities)

    def data_stripes(self, slot: int) -> tuple[int, ...]:
        """Stripes in which the slot holds data, in order of its chunks 0 ... k-1.

        Chunk c of member i belongs to stripe i + 1 + c, so that members that send in order load all receivers alike.
        """
        first = self.members.index(slot) + 1
        return tuple((first + chunk) % self.size for chunk in range(self.data))

    def parity_stripes(self, slot: int) -> tuple[int, ...]:
        """Stripes whose parity the slot holds; its j-th parity chunk belongs to the j-th of them."""
        return tuple(t for t in range(self.size) if slot in self.parities(t))


@dataclass(frozen=True, slots=True)
class Topology:
    """All groups of a job. Slots are 0 ... n-1, each in exactly one group."""

    groups: tuple[Group, ...]

    @property
    def slots(self) -> int:
        return sum(group.size for group in self.groups)

    def group_of(self, slot: int) -> Group:
        return next(group for group in self.groups if slot in group.members)

    def neighbours(self, slot: int) -> tuple[int, ...]:
        """The slot's parent and children in the binary tree of agents (parent of i: (i-1) div 2)."""
        around = ((slot - 1) // 2 if slot else -1, 2 * slot + 1, 2 * slot + 2)
        return tuple(other for other in around if 0 <= other < self.slots)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How workers share a data buffer: worker w owns `parts[w]` buckets after those of the workers before it.

    Data chunk j is buckets [j * chunk, (j + 1) * chunk) of the buffer; what lies behind the last part is zeros and is
    neither sent nor coded. `layout` is the hash of the layout that snapshots of this geometry belong to.
    """

    layout: str
    parts: tuple[int, ...]
    chunk: int

    def first(self, worker: int) -> int:
        """The bucket at which a worker's part starts."""
        return sum(self.parts[:worker])


class Phase(enum.Enum):
    """How far a snapshot has come on this agent."""

    FILLING = "filling"
    SEALED = "sealed"
    PREPARED = "prepared"
    COMMITTED = "committed"
    DRAINING = "draining"
    """Given up; a worker may still write into the buffer."""
    DURABLE = "durable"
    """Superseded; the data buffer is still being written to disk, the parity is gone. Not restored from."""
    REBUILT = "rebuilt"
    """Chosen at recovery, and some of this agent's chunks are still missing. Counts as committed."""


class Mode(enum.Enum):
    """Whether this agent takes part in snapshots."""

    JOINING = "joining"
    """Its memory is empty and it has not been told the choice of any epoch."""
    RECOVERING = "recovering"
    """An epoch began; nothing is given up until its choice is known."""
    ACTIVE = "active"
    """The choice is known; snapshots are taken."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the parity of one stripe has taken from one source: buckets before `next`, chained to `digest`."""

    next: int = 0
    digest: int = 0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """One snapshot in this agent's memory."""

    snapshot: SnapshotId
    geometry: Geometry
    group: Group
    phase: Phase
    data: int | None
    """Data buffer, and below the parity buffer; None when the copy holds none."""
    parity: int | None
    writers: frozenset[int] = frozenset()
    """Workers that were granted the buffer and have neither sealed, cancelled nor died."""
    sums: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Checksums of the buckets of each worker's sealed part."""
    rebuilt: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Checksums of the buckets of data chunks that came from peers, by stripe."""
    held: bool = False
    """The durable tier reads the data buffer."""
    verified: bool = False
    """The agent itself has read the data and found those checksums."""
    coding: Mapping[tuple[int, int], Progress] = field(default_factory=dict)
    """Progress of this agent's parity by (stripe, source)."""
    finishing: frozenset[int] = frozenset()
    """Stripes whose parity is complete and being verified."""
    good: Mapping[int, ChunkRecord] = field(default_factory=dict)
    """This agent's good chunks by stripe: data once verified, parity once coded."""
    members: Mapping[int, tuple[ChunkRecord, ...]] = field(default_factory=dict)
    """What each member of the group said it has stored, this agent included."""

    @property
    def candidate(self) -> bool:
        """Whether recovery may use it."""
        return self.phase in (Phase.SEALED, Phase.PREPARED, Phase.COMMITTED, Phase.REBUILT)

    @property
    def open(self) -> bool:
        """Whether it may still become committed."""
        return self.phase in (Phase.FILLING, Phase.SEALED, Phase.PREPARED)

    def chunk_sums(self, slot: int, stripe: int) -> tuple[int, ...]:
        """Checksums of the buckets of the data chunk that `slot`, this agent's, holds in the stripe."""
        if stripe in self.rebuilt:
            return self.rebuilt[stripe]
        flat = tuple(sum_ for worker in sorted(self.sums) for sum_ in self.sums[worker])
        first = self.group.data_stripes(slot).index(stripe) * self.geometry.chunk
        return flat[first : first + self.geometry.chunk]

    @property
    def committed(self) -> bool:
        """Whether it is committed, or was chosen at recovery."""
        return self.phase in (Phase.COMMITTED, Phase.REBUILT)


@dataclass(frozen=True, slots=True)
class State:
    """Everything one agent decides from. `initial` makes the first one of an incarnation."""

    run: str
    slot: int
    incarnation: int
    topology: Topology
    data_buffers: int
    parity_buffers: int
    geometry: Geometry | None = None
    """None until workers have attached: nothing is granted before."""
    mode: Mode = Mode.JOINING
    epoch: int = 0
    incarnations: tuple[int, ...] = ()
    """Incarnation of every slot in this epoch; messages of any other incarnation are dropped."""
    peers: frozenset[int] = frozenset()
    """Slots that are connected."""
    away: frozenset[int] = frozenset()
    """Slots that have not been connected for long: no worker waits for a commit that needs them."""
    copies: tuple[Copy, ...] = ()
    """At most `data_buffers`, oldest first."""
    waiting: tuple[tuple[int, SnapshotId], ...] = ()
    """(worker, snapshot) to be granted when a buffer is free."""
    newest: tuple[int, int] = (-1, -1)
    """Age of the newest snapshot that was granted or that this agent vowed never to store."""
    known: Mapping[SnapshotId, frozenset[int]] = field(default_factory=dict)
    """Groups known to be PREPARED, of snapshots newer than `committed`."""
    void: frozenset[SnapshotId] = frozenset()
    """Snapshots newer than `committed` that can never be committed."""
    wants: Mapping[tuple[SnapshotId, int, int], int] = field(default_factory=dict)
    """First bucket that (snapshot, stripe, slot) waits for, of snapshots not yet sealed here."""
    committed: SnapshotId | None = None
    """The newest snapshot known to be committed, held here or not."""
    decided_epoch: int = 0
    decided: SnapshotId | None = None
    """What the last decision restores, that of `decided_epoch`."""
    decided_whole: bool = False
    """Whether this node's data of `decided` were here when that was last looked at; True when nothing is restored."""
    planned_epoch: int = 0
    """Epoch whose decode orders this agent follows."""

    def copy(self, snapshot: SnapshotId | None) -> Copy | None:
        return next((copy for copy in self.copies if copy.snapshot == snapshot), None)

    @property
    def group(self) -> Group:
        return self.topology.group_of(self.slot)

    @property
    def restorable(self) -> bool:
        """Whether the decision of this epoch is in force and this node has all of its data."""
        return self.mode is Mode.ACTIVE and self.decided_whole


def initial(run: str, slot: int, incarnation: int, topology: Topology, *, durable: bool = False) -> State:
    """The state of an agent whose memory is empty.

    `incarnation` is higher than every earlier one of the slot. With `durable` there is a third data buffer.
    """
    parity_buffers = 2 if topology.group_of(slot).parity else 0
    return State(
        run=run,
        slot=slot,
        incarnation=incarnation,
        topology=topology,
        data_buffers=3 if durable else 2,
        parity_buffers=parity_buffers,
    )
