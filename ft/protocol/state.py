"""State of one agent as immutable values: groups and stripes, the copies in its buffers, facts from its peers.

No I/O happens here. Mappings are never modified in place; `keepwarm.ft.protocol.step.step` returns new values. What
changes with every event is a `msgspec.Struct`, of which a changed copy costs a tenth of that of a dataclass.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from keepwarm.ft.protocol.messages import ChunkRecord, SnapshotId, Undecodable
from keepwarm.ft.protocol.parity_placement import StripeGroup


@dataclass(frozen=True, slots=True)
class Topology:
    """All groups of a job. Slots are 0 ... n-1, and each belongs to exactly one group."""

    groups: tuple[StripeGroup, ...]
    slots: int = field(init=False, repr=False, compare=False)
    """Number of slots. It is read with every message, so it is not counted each time."""
    _of: Mapping[int, StripeGroup] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", sum(group.size for group in self.groups))
        object.__setattr__(self, "_of", {slot: group for group in self.groups for slot in group.members})

    def group_of(self, slot: int) -> StripeGroup:
        return self._of[slot]

    def neighbours(self, slot: int) -> tuple[int, ...]:
        """Return the slot's parent and children in the binary tree of agents (parent of i: (i-1) div 2)."""
        around = ((slot - 1) // 2 if slot else -1, 2 * slot + 1, 2 * slot + 2)
        return tuple(other for other in around if 0 <= other < self.slots)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Layout of a data buffer: worker w owns `parts[w]` buckets, after those of the workers before it.

    Data chunk j is buckets [j * chunk, (j + 1) * chunk) of the buffer. The space after the last part is zeros and is
    neither sent nor coded. `layout` is the hash of the job layout that snapshots of this geometry belong to.
    """

    layout: str
    parts: tuple[int, ...]
    chunk: int

    def first(self, worker: int) -> int:
        """Return the first bucket of a worker's part."""
        return sum(self.parts[:worker])


class Phase(enum.Enum):
    """Progress of a snapshot on this agent."""

    FILLING = "filling"
    SEALED = "sealed"
    PREPARED = "prepared"
    COMMITTED = "committed"
    DRAINING = "draining"
    """Discarded, but a worker may still write to the buffer."""
    DURABLE = "durable"
    """Superseded. The data buffer is still being written to disk and the parity is gone. Not restorable."""
    REBUILT = "rebuilt"
    """Chosen at recovery, but some of this agent's chunks are still missing. Counts as committed."""
    KEPT = "kept"
    """Not chosen at recovery. Restorable until workers have completed a step from what was chosen."""


class Mode(enum.Enum):
    """Whether this agent takes part in snapshots."""

    JOINING = "joining"
    """The agent is new and has not received any epoch's decision. Its memory is empty or that of one that died."""
    RECOVERING = "recovering"
    """An epoch has begun. Nothing is released until its decision is known."""
    ACTIVE = "active"
    """The decision is known and snapshots are taken."""


class Progress(msgspec.Struct, frozen=True):
    """Buckets a stripe's parity has received from one source: those before `next`, chained into `digest`."""

    next: int = 0
    digest: int = 0
    ended: bool = False


class Copy(msgspec.Struct, frozen=True):
    """One snapshot in this agent's memory."""

    snapshot: SnapshotId
    geometry: Geometry
    group: StripeGroup
    phase: Phase
    data: int | None
    """Data buffer and, below, parity buffer. None if the copy has none."""
    parity: int | None
    writers: frozenset[int] = frozenset()
    """Workers that were granted the buffer and have not sealed, cancelled or died."""
    sums: Mapping[int, tuple[int, ...]] = msgspec.field(default_factory=dict)
    """Bucket checksums of each worker's sealed part."""
    rebuilt: Mapping[int, tuple[int, ...]] = msgspec.field(default_factory=dict)
    """Bucket checksums of data chunks rebuilt by peers, by stripe."""
    held: bool = False
    """The durable tier is reading the data buffer."""
    whole: bool = False
    """The agent has learned that all members stored the snapshot: it was committed."""
    restored: bool = False
    """An epoch has restored the snapshot: others may know that it was committed, and it may be whole again."""
    verified: bool = False
    """The agent has read the data back and confirmed those checksums."""
    coding: Mapping[tuple[int, int], Progress] = msgspec.field(default_factory=dict)
    """Progress of this agent's parity by (stripe, source)."""
    finishing: frozenset[int] = frozenset()
    """Stripes whose parity is complete and being verified."""
    good: Mapping[int, ChunkRecord] = msgspec.field(default_factory=dict)
    """This agent's good chunks by stripe: data once verified, parity once coded."""
    members: Mapping[int, tuple[ChunkRecord, ...]] = msgspec.field(default_factory=dict)
    """Chunks that each group member, this agent included, has announced as stored."""

    @property
    def candidate(self) -> bool:
        """Whether recovery may choose this copy."""
        return self.phase in (Phase.SEALED, Phase.PREPARED, Phase.COMMITTED, Phase.REBUILT, Phase.KEPT)

    @property
    def precious(self) -> bool:
        """Whether the snapshot may be the newest one that is whole, so that it stays beside a newer one that is not."""
        return self.whole or self.restored

    @property
    def open(self) -> bool:
        """Whether the snapshot can still be committed."""
        return self.phase in (Phase.FILLING, Phase.SEALED, Phase.PREPARED)

    def chunk_sums(self, slot: int, stripe: int) -> tuple[int, ...]:
        """Return the bucket checksums of the data chunk in the stripe on `slot`, which is this agent's slot."""
        if stripe in self.rebuilt:
            return self.rebuilt[stripe]
        flat = tuple(sum_ for worker in sorted(self.sums) for sum_ in self.sums[worker])
        first = self.group.data_stripes(slot).index(stripe) * self.geometry.chunk
        return flat[first : first + self.geometry.chunk]

    def data_sums(self, slot: int) -> tuple[int, ...]:
        """Return the bucket checksums of all data on `slot`, which is this agent's slot, as they were sealed."""
        return tuple(sum_ for stripe in self.group.data_stripes(slot) for sum_ in self.chunk_sums(slot, stripe))

    @property
    def committed(self) -> bool:
        """Whether the snapshot is committed or was chosen at recovery."""
        return self.phase in (Phase.COMMITTED, Phase.REBUILT)


class State(msgspec.Struct, frozen=True):
    """Complete protocol state of one agent. `initial` creates the first state of an incarnation."""

    run: str
    slot: int
    incarnation: int
    topology: Topology
    data_buffers: int
    parity_buffers: int
    geometry: Geometry | None = None
    """None until workers have attached. Nothing is granted before that."""
    mode: Mode = Mode.JOINING
    epoch: int = 0
    incarnations: tuple[int, ...] = ()
    """Incarnation of every slot in the last decision. While it is in force, messages from any other are dropped."""
    peers: frozenset[int] = frozenset()
    """Connected slots."""
    away: frozenset[int] = frozenset()
    """Slots disconnected for so long that no worker waits for a commit that needs them."""
    copies: tuple[Copy, ...] = ()
    """At most `data_buffers`, oldest first."""
    waiting: tuple[tuple[int, SnapshotId], ...] = ()
    """(worker, snapshot) pairs to be granted when a buffer is free."""
    newest: tuple[int, int] = (-1, -1)
    """Age of the newest snapshot that was granted or refused for good: a watermark. Up to it, this agent has stored or
    may still store only what it holds or what was committed. The rest is void, whether or not it was heard of."""
    known: Mapping[SnapshotId, frozenset[int]] = msgspec.field(default_factory=dict)
    """Snapshots that were begun and that this agent holds or has not reached yet, with the groups known to be PREPARED.
    """
    void: frozenset[SnapshotId] = frozenset()
    """Snapshots that can never be committed: all known ones that are newer than `newest`, and the last few that are
    older, so that a fact is passed on once."""
    wants: Mapping[tuple[SnapshotId, int, int], int] = msgspec.field(default_factory=dict)
    """First bucket wanted by (snapshot, stripe, slot), for snapshots not yet sealed here."""
    committed: SnapshotId | None = None
    """The newest snapshot known to be whole on all members, of this epoch or restored and whole again; until then the
    one kept beside the restored one, if any, which was committed or restored before."""
    decided_epoch: int = 0
    decided: SnapshotId | None = None
    """Snapshot restored by the last decision, that of `decided_epoch`."""
    resumed: bool = False
    """Whether a worker has completed a step since that decision."""
    undecodable: frozenset[Undecodable] = frozenset()
    """Decodings that failed, of snapshots that are held here."""
    decided_whole: bool = False
    """Whether this node had all data of `decided` when last checked. True if nothing is restored."""
    unsettled: int = 0
    """The epoch that was not decided, as far as it knew, when the agent died whose memory this one has. This agent may
    still take part in it; 0: in none before the next."""
    planned_epoch: int = 0
    """Epoch of the decode orders that this agent follows."""

    def copy(self, snapshot: SnapshotId | None) -> Copy | None:
        return next((copy for copy in self.copies if copy.snapshot == snapshot), None)

    @property
    def group(self) -> StripeGroup:
        return self.topology.group_of(self.slot)

    @property
    def near(self) -> tuple[int, ...]:
        """Return the other members of the group and the neighbours in the tree: all agents that facts come from."""
        near = {*self.group.members, *self.topology.neighbours(self.slot)}
        return tuple(sorted(near - {self.slot}))

    @property
    def exposed(self) -> bool:
        """Whether only a new snapshot can make the memory safe, and none is under way although one could be committed.

        What was committed is gone, is not whole on all members or does not decode. An agent whose memory is empty asks
        for a snapshot too: that is how its workers make it join.
        """
        if self.geometry is None or self.away or any(copy.open for copy in self.copies):
            return False
        if self.mode is not Mode.ACTIVE:
            return self.mode is Mode.JOINING and not any(copy.candidate for copy in self.copies)
        failed = any(each.snapshot == self.committed for each in self.undecodable)
        return failed or self.copy(self.committed) is None

    @property
    def restorable(self) -> bool:
        """Whether this epoch's decision is in force and this node has all of its data."""
        return self.mode is Mode.ACTIVE and self.decided_whole


def initial(run: str, slot: int, incarnation: int, topology: Topology, *, durable: bool = False) -> State:
    """Return the state of an agent whose memory is empty.

    `incarnation` is higher than all earlier ones of the slot. With `durable` there is a third data buffer.
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
