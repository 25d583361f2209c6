"""Slot ownership and restarts of a run, decided by pure, torch-free functions.

One `Table` describes all nodes of a run. Every change is a function from a table to the next one, applied by the store
(`keepwarm.launch.node.shared_table`), so that changes are serialized no matter who asks for them.

- The number of slots is fixed. An owner keeps its slot until it is lost; a spare takes only vacant slots. Rank follows
  from slot, so survivors keep their ranks.
- All workers start together, in restart 0, 1, 2 and so on. They start once every slot has an owner and every owner has
  arrived; anything that ends the workers of one slot begins the next restart for all.
- A node that was given up is in no table. When it wakes up it notices before it does anything else: it is fenced,
  ends what it started, and may come back as a spare.
- If the job allows, vacant slots that no node takes are given up: the run goes on with fewer slots, and gets them back
  once there are enough nodes and its workers have handed over their state. Each time the next layout reads the state
  from the memory of the agents of the one before, or from disk.
- A node whose workers repeatedly end the run, or that repeatedly keeps the others waiting, makes room for a spare and
  does not come back; one with a broken GPU does so at once. No more nodes are excluded in one restart than a group can
  lose without losing memory.
- Once workers have run, owners change only with a majority of those before them (`keepwarm.launch.node.view`): nothing
  is given to spares, given up or started by a few nodes that have lost sight of the others.
- Nodes are known by the identity of one start of their supervisor; blame and exclusion stay with the name.
"""

from collections.abc import Collection
from typing import Literal, get_args

import msgspec

from keepwarm.launch.node.view import Member, Number, Verdict, View, may_be_installed, missing, name_of, verdict

Kind = Literal["lost", "gpu", "killed", "hung", "failed"]
"""How the workers of a slot failed, root causes first: their node was lost, its GPU is broken, a signal ended one, one
detected a hang, which is attributed to the node that it waited for, or one ended by itself, as it does when another one
has given up."""
ATTRIBUTION_WINDOW_S = 86_400.0
"""How long a failure counts against the node to which it is attributed."""
TERMINATION_GRACE_S = 2.0
"""How long a node that was asked to end stays to see whether others were: batch systems do not reach all at once."""
MAX_HANGS = 2
"""Failures attributed to one node, the last of them a hang, before a spare takes its slot. Hangs cost minutes each."""

FIRST_GRACE_S = 60.0
"""How long spares leave vacant slots of the first start to the nodes meant for them."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a restart became necessary."""

    kind: Kind
    cause: str
    slot: int
    time: float
    """When it was detected, in seconds since 1970."""
    silence: float = 0.0
    """Seconds without a heartbeat before it was detected."""
    at_fault: tuple[int, ...] = ()
    """Of a hang: the slots that did not reach what the others wait in; empty if that is not known."""


class FormerOwners(msgspec.Struct, frozen=True, kw_only=True):
    """The layout before the present one, whose agents hold its state until the present one has committed its own."""

    generation: int
    owners: dict[int, str]
    """Node by slot; the node that made memory complete has the agents of the lost slots."""
    epoch: int
    """The decision of these agents on what is restored, of which they hold every chunk."""
    step: int
    """The step that it restores."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The end of the run, for every node."""

    code: int
    reason: str


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The state that all nodes agree on."""

    slots: int
    max_restarts: int
    """Upper limit of `charged_restarts`; one more ends the run."""
    max_node_failures: int | None = None
    """Restarts attributed to one node before a spare takes its slot; None: any number."""
    max_excluded: int = 1
    """Nodes that may be excluded in one restart: as many as a group can lose without losing memory."""
    sizes: tuple[int, ...] = ()
    """Numbers of slots with which the job may run, largest first."""
    groups: dict[int, tuple[tuple[int, ...], ...]] = {}
    """Slots that protect each other, by the number of slots; empty if nodes have no failure domains."""
    growing: bool = False
    """Workers were asked for their state, and to end, so that the run can grow."""
    grows_in_memory: bool = False
    """They are to commit it in memory, from where the larger layout reads it, and not to save it on disk."""
    draining: str | None = None
    """The node that is to leave as soon as the workers have handed over their state."""
    drained: tuple[str, ...] = ()
    """Nodes that have left in this way."""
    terminated: tuple[str, ...] = ()
    """Nodes that were asked to end by SIGTERM."""
    flushing_node: str | None = None
    """The node that coordinates writing memory to disk before the run shrinks."""
    flush_epoch: int = 0
    """The agents' decision (epoch) that all agents must write to disk; 0: none."""
    flush_former: bool = False
    """These are the agents of the layout before."""
    resized: bool = False
    """This restart has another number of slots than the one before: the agents of its layout hold nothing yet."""
    generation: int = 0
    """Number of the layout: how often the number of slots has changed. Each layout has agents of its own."""
    former: FormerOwners | None = None
    """Holders of the state of the layout before; None once this one has committed, or if that state is on disk."""
    restart: int = 0
    """How often the ranks of the run have begun again; 0 is the first start."""
    owners: dict[int, str] = {}
    """Node by slot."""
    arrived: tuple[str, ...] = ()
    """Owners that are ready to start the workers of this restart."""
    agreed: tuple[str, ...] = ()
    """Spares that owned a slot before and have accepted these owners."""
    finished: tuple[str, ...] = ()
    """Owners whose workers have finished the job in this restart."""
    spares: tuple[str, ...] = ()
    """Nodes without a slot, longest waiting first."""
    failures: tuple[Failure, ...] = ()
    """Since the last restart in which workers ran."""
    moved: tuple[int, ...] = ()
    """Slots that have lost their owner since then."""
    attributed: dict[str, tuple[float, ...]] = {}
    """Times of the failures attributed to each node, in seconds since 1970."""
    excluded: dict[str, str] = {}
    """Nodes that no longer take part, and why."""
    charged_restarts: int = 0
    """Restarts charged against `max_restarts`: those in which no node was lost and the run was not resized."""
    begun: bool = False
    """Workers have run before, so that vacant slots are those of lost nodes."""
    ended: Ended | None = None
    store: int = 0
    """Number of the store that holds this table."""
    proposal: int = 0
    """How often the owners have changed."""
    view: View | None = None
    """The owners that were installed last; None before workers have run."""
    accepted: tuple[View, ...] = ()
    """Later views that owners accepted under other stores: each may have been installed."""
    members: dict[str, Member] = {}
    """Addresses of all nodes."""
    absent: tuple[str, ...] = ()
    """Nodes of the store before this one that have not come to this one yet."""
    dead: tuple[str, ...] = ()
    """Owners in `view` and `accepted` whose processes have certainly ended."""
    claimed: bool = False
    """This store holds the claim on the view after `view`."""

    @property
    def complete(self) -> bool:
        """Whether workers run or may start."""
        return self.all_arrived and self.view is not None and self.view.number == self.number

    @property
    def all_arrived(self) -> bool:
        return len(self.owners) == self.slots and len(self.arrived) == self.slots

    @property
    def number(self) -> Number:
        """Number of the view that these owners are or will be."""
        return self.store, self.proposal

    @property
    def proposed(self) -> View | None:
        """The view of these owners; None while a slot is vacant, as nothing can be installed then."""
        if self.vacant:
            return None
        unknown = Member(node="", host="", port=0)
        members = {
            slot: msgspec.structs.replace(self.members.get(node, unknown), node=node)
            for slot, node in self.owners.items()
        }
        return View(number=self.number, members=members)

    @property
    def here(self) -> frozenset[str]:
        """Nodes that follow this store."""
        return frozenset((*self.owners.values(), *self.spares)) - set(self.absent)

    @property
    def spares_here(self) -> tuple[str, ...]:
        """Spares that follow this store: one that has not come yet may have been lost with the store before."""
        return tuple(spare for spare in self.spares if spare not in self.absent)

    @property
    def views(self) -> tuple[View, ...]:
        """Views of which a majority is needed."""
        return () if self.view is None else (self.view, *self.accepted)

    @property
    def decides(self) -> bool:
        """Whether the nodes that follow this store may change owners: not while others may do so elsewhere."""
        return verdict(self.views, self.here, self.dead) != "wait"

    @property
    def consent(self) -> Verdict:
        """Whether the owners before these have accepted them."""
        return verdict(self.views, (*self.arrived, *self.agreed), self.dead)

    def awaits(self, node: str) -> bool:
        """Return whether a node has yet to arrive, or to agree to the owners that replace it."""
        if node in self.absent or node in self.arrived or node in self.agreed:
            return False
        was_owner = any(node in view.nodes for view in self.views)
        return self.slot_of(node) is not None or (was_owner and node in self.spares and not self.complete)

    @property
    def waits_for(self) -> list[str]:
        """Names of the nodes that may go on elsewhere, if that keeps these ones from going on."""
        return [] if self.decides else missing(self.views, self.here, self.dead)

    @property
    def vacant(self) -> tuple[int, ...]:
        return tuple(slot for slot in range(self.slots) if slot not in self.owners)

    def slot_of(self, node: str) -> int | None:
        return next((slot for slot, owner in self.owners.items() if owner == node), None)

    def knows(self, node: str) -> bool:
        """Return False for a node that never joined or was given up."""
        return node in self.spares or self.slot_of(node) is not None

    @property
    def root_causes(self) -> tuple[Failure, ...]:
        """The failures that explain the others: a lost node or killed worker makes workers elsewhere fail."""
        for kind in get_args(Kind):
            found = tuple(failure for failure in self.failures if failure.kind == kind)
            if found:
                return found
        return ()


def survivors_are_reusable(table: Table) -> bool:
    """Return whether the last failure came from outside (killed workers, lost nodes, a broken GPU), so that survivors
    may be resumed.

    A worker that failed by itself may have done so because of the state of its own process or of another one.
    """
    return any(failure.kind in ("lost", "gpu", "killed") for failure in table.root_causes)


RequestedSlot = int | Literal["any", "spare"]
"""The slot that a node asks for, any vacant one, or none until a node is lost."""


def join(table: Table, node: str, requested_slot: RequestedSlot, *, seen_restart: int = -1) -> Table:
    """Add a node, as an owner if possible, else as a spare.

    `seen_restart` is the last restart in which the node took part under an earlier store: restarts never go back.
    """
    if seen_restart >= table.restart:
        table = _change(table, restart=seen_restart + 1, arrived=(), agreed=(), finished=(), begun=True)
    if node in table.absent:
        table = _change(table, absent=tuple(other for other in table.absent if other != node))
    if table.knows(node) or name_of(node) in table.excluded:
        return table
    slot = requested_slot if isinstance(requested_slot, int) and requested_slot in table.vacant else None
    if requested_slot == "any" or (isinstance(requested_slot, int) and table.begun):
        slot = slot if slot is not None else min(table.vacant, default=None)
    if slot is None or table.ended is not None or not table.decides:
        return _change(table, spares=(*table.spares, node))
    return _assign(table, {**table.owners, slot: node})


def namesake(table: Table, node: str) -> str | None:
    """Return another start of the same node's supervisor that is in the table."""
    name = name_of(node)
    nodes = (*table.owners.values(), *table.spares)
    return next((other for other in nodes if other != node and name_of(other) == name), None)


def fill(table: Table) -> Table:
    """Give vacant slots to spares, if the nodes that follow this store may decide that."""
    while table.vacant and table.spares_here and table.ended is None and table.decides:
        slot = table.vacant[0]
        chosen = _spare_for(table, slot)
        rest = tuple(spare for spare in table.spares if spare != chosen)
        # If the owner was lost together with the previous store, this is the only place that records it.
        moved = tuple(sorted({*table.moved, slot})) if table.begun else ()
        table = _assign(table, {**table.owners, slot: chosen}, spares=rest, moved=moved)
    return table


def _spare_for(table: Table, slot: int) -> str:
    """Return the spare whose failure domain has the fewest nodes of the slot's group; of these, the longest waiting."""

    def domain(node: str) -> str:
        member = table.members.get(node)
        return node if member is None or not member.domain else member.domain

    group = next((group for group in table.groups.get(table.slots, ()) if slot in group), ())
    taken = [domain(table.owners[other]) for other in group if other in table.owners]
    return min(table.spares_here, key=lambda spare: taken.count(domain(spare)))


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has made sure of before the run changes its size: this decision is complete in the agents' memory."""

    node: str
    """It runs the agents of lost slots."""
    epoch: int
    step: int


def claim_flush(table: Table, node: str) -> Table:
    """Make a node coordinate the flush to disk before the run shrinks; return `table` if it cannot shrink."""
    if table.flushing_node is not None or not table.knows(node) or shrink(table) is table:
        return table
    return _change(table, flushing_node=node)


def announce_flush(table: Table, node: str, epoch: int, *, former: bool = False) -> Table:
    """Record the epoch that all agents must write: substitutes for the lost slots hold their decoded memory.

    With `former` these are the agents of the layout before, which the owner of slot 0 may also have write.
    """
    if table.flushing_node != node and not (former and must_flush_former(table) and table.slot_of(node) == 0):
        return table
    return _change(table, flush_epoch=epoch, flush_former=former)


def lost_of_former(table: Table) -> tuple[int, ...]:
    """Return the slots of the layout before whose agents are lost with their nodes."""
    owners = {} if table.former is None else table.former.owners
    return tuple(slot for slot, node in owners.items() if not table.knows(node))


def must_flush_former(table: Table) -> bool:
    """Return whether the state of the layout before must go to disk before workers start.

    So it is if workers have tried to read it from memory, or if a node that held some of it is lost. The owner of slot
    0 sees to it before it arrives.
    """
    return table.former is not None and (not table.resized or bool(lost_of_former(table)))


def settle(table: Table, generation: int) -> Table:
    """Let the agents of the layout before this one go: layout `generation` has its own memory, or the disk has it."""
    return _change(table, former=None) if table.generation == generation else table


def size_after_shrinking(table: Table) -> int | None:
    """Return the largest allowed number of slots for which there are owners; None if there is none."""
    return next((size for size in table.sizes if size <= len(table.owners)), None)


def shrink(table: Table, kept: Kept | None = None) -> Table:
    """Give up slots until the others all have owners; return `table` if no allowed number is small enough.

    With `kept` the agents of this layout stay and hold its state, until the next one has committed.
    """
    size = size_after_shrinking(table)
    if not table.vacant or table.spares or size is None or not table.begun or table.ended is not None:
        return table
    if not table.decides:
        return table
    if kept is None:
        return _resize(table, size)
    owners = {**dict.fromkeys(table.vacant, kept.node), **table.owners}
    former = FormerOwners(generation=table.generation, owners=owners, epoch=kept.epoch, step=kept.step)
    return _change(_resize(table, size), former=former)


def may_grow(table: Table) -> bool:
    """Return whether the workers can be asked for their state because spares allow for more slots."""
    asked = table.growing or table.draining is not None
    return table.complete and not asked and table.ended is None and size_after_growing(table) > table.slots


def request_growth(table: Table, *, in_memory: bool) -> Table:
    """Ask the workers for their state if spares allow for more slots, or for a state on disk after one in memory."""
    if table.growing and table.grows_in_memory and not in_memory:
        return _change(table, grows_in_memory=False)
    return _change(table, growing=True, grows_in_memory=in_memory) if may_grow(table) else table


def refusal_to_drain(table: Table, node: str) -> str:
    """Return why a node cannot leave without a loss now; empty if it can."""
    name = name_of(node)
    smaller = any(size < len(table.owners) for size in table.sizes)
    if table.ended is not None:
        return f"the run has ended: {table.ended.reason}"
    if node in table.spares:
        return ""
    if table.slot_of(node) is None:
        return f"{name} is not part of the run"
    if table.draining not in (None, node):
        return f"{name_of(table.draining or '')} is being drained; one node leaves at a time"
    if not table.complete or table.growing:
        return "the run is restarting; try again when it trains"
    if not table.spares_here and not smaller:
        return f"no spare could take slot {table.slot_of(node)}, and the run may not shrink (cluster.elastic)"
    return ""


def drain(table: Table, node: str, now: float) -> Table:
    """Let a spare leave; ask the workers of all slots to hand over their state so that an owner can leave."""
    if refusal_to_drain(table, node):
        return table
    if node not in table.spares:
        return _change(table, draining=node)
    cause = f"{name_of(node)} was drained"
    return lose(_change(table, drained=(*table.drained, node)), node, cause, now, dead=True)


def terminate(table: Table, node: str) -> Table:
    """Note that a node was asked to end by SIGTERM."""
    here = (*table.owners.values(), *table.spares)
    return _change(table, terminated=tuple(other for other in here if other == node or other in table.terminated))


def after_termination(table: Table, node: str, waited: float) -> Literal["wait", "leave", "end"]:
    """Return what a node does that was asked to end `waited` seconds ago.

    A cloud that takes a machine back asks its supervisor alone; a batch system that ends a job asks all of them.
    wait: nothing yet, or it is leaving; leave: ask the others to let it; end: a spare ends, an owner has the workers of
    all nodes save their state and end.
    """
    if table.ended is not None or node in table.drained or table.draining == node:
        return "wait"
    if table.slot_of(node) is None:
        return "end"
    staying = [other for other in (*table.owners.values(), *table.spares) if other not in table.terminated]
    if len(staying) < min(table.sizes, default=table.slots):
        return "end"
    return "wait" if waited < TERMINATION_GRACE_S or refusal_to_drain(table, node) else "leave"


def stop_draining(table: Table, node: str) -> Table:
    """Let the node stay, if it has not left yet."""
    return _change(table, draining=None) if table.draining == node else table


def hand_over(table: Table, restart: int, now: float, *, on_disk: bool) -> Table:
    """Give the slot of the draining node to a spare: the workers of `restart` have handed over their state.

    Without a spare the run goes on with fewer slots: at once if the state is on disk, where the next layout reads it.
    """
    node = table.draining
    if node is None or table.restart != restart or table.ended is not None:
        return table
    table = _change(table, draining=None, drained=(*table.drained, node))
    table = lose(table, node, f"{name_of(node)} was drained", now, dead=True)
    return shrink(table) if on_disk else table


def grow(table: Table, restart: int, kept: Kept | None = None, *, saved: bool = True) -> Table:
    """Begin the next restart with as many slots as there are nodes for: the workers of `restart` have ended.

    Their state is on disk, or with `kept` in the memory of the agents of this layout, which stay until the next one has
    committed. If it was not `saved`, in neither way for certain, the layout stays: its agents hold what was committed.
    """
    if not table.growing or table.restart != restart or table.ended is not None:
        return table
    size = size_after_growing(table)
    table = _next_restart(table)
    if size <= table.slots or not saved:
        return table
    if kept is None:
        return _resize(table, size)
    former = FormerOwners(generation=table.generation, owners=table.owners, epoch=kept.epoch, step=kept.step)
    return _change(_resize(table, size), former=former)


def size_after_growing(table: Table) -> int:
    """Return the largest allowed number of slots for which there are nodes, else the present one."""
    here = len(table.owners) + len(table.spares_here)
    return next((size for size in table.sizes if size <= here), table.slots)


def _resize(table: Table, size: int) -> Table:
    """Change the number of slots. Owners keep slots that remain; other owners, then spares, take the vacant ones.

    The state is on disk: no agents of an earlier layout are needed.
    """
    owners = {slot: node for slot, node in table.owners.items() if slot < size}
    waiting = [node for slot, node in table.owners.items() if slot >= size] + list(table.spares_here)
    for slot in range(size):
        if slot not in owners and waiting:
            owners[slot] = waiting.pop(0)
    waiting += [spare for spare in table.spares if spare in table.absent]
    return _assign(
        table,
        owners,
        slots=size,
        spares=tuple(waiting),
        resized=True,
        generation=table.generation + 1,
        former=None,
        flushing_node=None,
        flush_epoch=0,
        moved=(),
    )


def arrive(table: Table, node: str, restart: int) -> Table:
    """Record that a node is ready to start its workers. The last node to arrive makes the table complete.

    A spare that was an owner agrees in this way to the owners that replace it.
    """
    if table.restart != restart or table.ended is not None or not table.awaits(node):
        return table
    if table.slot_of(node) is None:
        return install(_change(table, agreed=(*table.agreed, node)))
    return install(_change(table, arrived=(*table.arrived, node)))


def install(table: Table) -> Table:
    """Let workers start once all owners have arrived and a majority of the owners before them is among these."""
    if not table.all_arrived or table.ended is not None:
        return table
    needed = table.consent
    if needed == "wait" or (needed == "claim" and not table.claimed):
        return table
    table = _attribute(table)
    if not table.all_arrived:
        return table
    at_fault = table.begun and bool(table.failures) and not table.moved and not table.resized
    charged_restarts = table.charged_restarts + at_fault
    if charged_restarts > table.max_restarts:
        cause = table.root_causes[0].cause
        return end(table, 4, f"{cause}, after {table.max_restarts} restarts (cluster.max_restarts)")
    return _change(
        table, charged_restarts=charged_restarts, begun=True, flushing_node=None, flush_epoch=0,
        view=table.proposed, accepted=(), dead=(), claimed=False,
    )  # fmt: skip


def needs_claim(table: Table) -> bool:
    """Return whether all owners have arrived and only the claim on the next view is missing."""
    return table.all_arrived and not table.complete and not table.claimed and table.consent == "claim"


def claim(table: Table) -> Table:
    """Note that this store holds the claim on the next view."""
    return install(_change(table, claimed=True))


def _attribute(table: Table) -> Table:
    """Attribute the last failure to nodes, and exclude those that reached their limit if spares can replace them."""
    found = [] if table.moved else [(table.owners[slot], failure) for slot, failure in _culprits(table)]
    excluded = 0
    for node, failure in found:
        name = name_of(node)
        earlier = table.attributed.get(name, ())
        times = (*(at for at in earlier if failure.time - at < ATTRIBUTION_WINDOW_S), failure.time)
        table = _change(table, attributed={**table.attributed, name: times})
        limit = _limit(table, failure.kind)
        # A node that cannot train helps no run that may go on with fewer.
        smaller = failure.kind == "gpu" and any(size < len(table.owners) for size in table.sizes)
        replaceable = bool(table.spares_here) or smaller
        if limit is not None and len(times) >= limit and replaceable and excluded < table.max_excluded:
            excluded += 1
            why = failure.cause
            if failure.kind != "gpu":
                why = f"its workers failed {len(times)} times, most recently: {failure.cause}"
            table = exclude(table, node, why, failure.time)
    return table


def _culprits(table: Table) -> tuple[tuple[int, Failure], ...]:
    """Return the slots to which the last failure is attributed. Lost nodes have no slot any more.

    Killed workers and broken GPUs make others fail; among failed ones, the first may have caused the rest. A hang is
    attributed to those that the others wait for, unless they are so many that they must be waiting for something else.
    """
    causes = table.root_causes
    if not causes or causes[0].kind == "lost":
        return ()
    if causes[0].kind == "hung":
        verdict = next((failure for failure in causes if failure.at_fault), causes[0])
        slots = verdict.at_fault if len(verdict.at_fault) <= table.max_excluded else ()
        return tuple((slot, verdict) for slot in slots)
    return tuple((failure.slot, failure) for failure in (causes[:1] if causes[0].kind == "failed" else causes))


def _limit(table: Table, kind: Kind) -> int | None:
    """Return how many failures may be attributed to a node before a spare takes its slot, the last one of this kind."""
    if table.max_node_failures is None:
        return None
    return {"gpu": 1, "hung": min(MAX_HANGS, table.max_node_failures)}.get(kind, table.max_node_failures)


def exclude(table: Table, node: str, why: str, now: float, *, dead: bool = False) -> Table:
    """Remove a node for good; a spare takes its slot. `dead`: its supervisor decides nothing more."""
    name = name_of(node)
    others = tuple(owner for owner in table.arrived if owner != node)
    table = _change(table, arrived=others, excluded={**table.excluded, name: why})
    return lose(table, node, f"{name} is excluded: {why}", now, dead=dead)


def fail(table: Table, node: str, restart: int, kind: Kind, cause: str, now: float) -> Table:
    """Record that workers of a node ended early: all workers start again in the next restart.

    That a GPU of the node is broken may be found out later, and then explains what was recorded of the node before.
    """
    return _fail(table, node, restart, Failure(kind=kind, cause=cause, slot=table.slot_of(node) or 0, time=now))


def hang(table: Table, node: str, restart: int, at_fault: Collection[int], cause: str, now: float) -> Table:
    """Record that workers of a node ended as the others wait for those of the slots `at_fault`."""
    slots = tuple(sorted({slot for slot in at_fault if 0 <= slot < table.slots}))
    failure = Failure(kind="hung", cause=cause, slot=table.slot_of(node) or 0, time=now, at_fault=slots)
    return _fail(table, node, restart, failure)


def _fail(table: Table, node: str, restart: int, failure: Failure) -> Table:
    if table.slot_of(node) is None or table.ended is not None:
        return table
    if table.restart == restart and table.complete:
        table = _next_restart(table)
    elif table.restart != restart + 1:
        return table
    known = tuple(other for other in table.failures if other.slot == failure.slot)
    if any(other.kind == "gpu" or failure.kind != "gpu" for other in known):
        return table
    return _change(table, failures=(*(other for other in table.failures if other not in known), failure))


def lose(table: Table, node: str, cause: str, now: float, *, silence: float = 0.0, dead: bool = False) -> Table:
    """Remove a node that must be considered dead; a spare takes its slot. `dead`: its process has certainly ended."""
    slot = table.slot_of(node)
    table = _change(
        table,
        spares=tuple(spare for spare in table.spares if spare != node),
        absent=tuple(other for other in table.absent if other != node),
        members={other: member for other, member in table.members.items() if other != node},
        draining=None if table.draining == node else table.draining,
    )
    if dead and any(node in view.nodes for view in table.views) and node not in table.dead:
        table = _change(table, dead=(*table.dead, node))
    if slot is None or table.ended is not None:
        return install(table) if table.all_arrived and not table.complete else table
    if table.complete:
        table = _next_restart(table)
    failure = Failure(kind="lost", cause=cause, slot=slot, time=now, silence=silence)
    table = _assign(
        table,
        {key: owner for key, owner in table.owners.items() if owner != node},
        finished=tuple(owner for owner in table.finished if owner != node),
        failures=(*table.failures, failure) if table.begun else (),
        moved=tuple(sorted({*table.moved, slot})) if table.begun else (),
        flushing_node=None,
        flush_epoch=0,
    )
    return fill(table) if table.begun else table


def inherit(table: Table, store: int, dead: Collection[str]) -> Table:
    """Return the first table of the next store from the last one that the node which opens it knew.

    Nothing is forgotten with a store: every slot keeps its owner until the owner fails to come, and sizes, restarts,
    blame and excluded nodes stay. `dead`: nodes whose processes have certainly ended.
    """
    table = _next_restart(table) if table.complete else _change(table, restart=table.restart + table.begun)
    nodes = (*table.owners.values(), *table.spares)
    known = tuple(node for node in dead if any(node in view.nodes for view in table.views))
    return _change(
        table, store=store, absent=nodes, arrived=(), agreed=(), finished=(), growing=False, grows_in_memory=False,
        draining=None, claimed=False,
        dead=tuple(dict.fromkeys((*table.dead, *known))), flushing_node=None, flush_epoch=0,
    )  # fmt: skip


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What a node brings to a store from those before it."""

    restart: int = -1
    """The last one for which it started workers."""
    charged_restarts: int = 0
    attributed: dict[str, tuple[float, ...]] = {}
    excluded: dict[str, str] = {}
    installed: View | None = None
    accepted: View | None = None


def follow(table: Table, member: Member, known: Known) -> Table:
    """Note a node's address and what it knows of earlier stores."""
    names = {*table.attributed, *known.attributed}
    attributed = {
        name: tuple(sorted({*table.attributed.get(name, ()), *known.attributed.get(name, ())})) for name in names
    }
    installed, others = table.view, [*table.accepted, known.accepted]
    if known.installed is not None and (installed is None or known.installed.number > installed.number):
        installed = known.installed
    view, *accepted = may_be_installed(installed, others) or (None,)
    return _change(
        table, members={**table.members, member.node: member}, attributed=attributed, view=view,
        accepted=tuple(each for each in accepted if each.number != table.number),
        charged_restarts=max(table.charged_restarts, known.charged_restarts),
        excluded={**known.excluded, **table.excluded}, begun=table.begun or installed is not None,
    )  # fmt: skip


def finish(table: Table, node: str, restart: int) -> Table:
    """Record that all workers of a node have finished; the last node ends the run."""
    if table.slot_of(node) is None or table.restart != restart or not table.complete or node in table.finished:
        return table
    table = _change(table, finished=(*table.finished, node))
    return end(table, 0, "the job is done") if len(table.finished) == table.slots else table


def end(table: Table, code: int, reason: str) -> Table:
    """End the run for every node; the first reason stands."""
    return table if table.ended is not None else _change(table, ended=Ended(code=code, reason=reason))


def _next_restart(table: Table) -> Table:
    return _change(
        table,
        restart=table.restart + 1,
        arrived=(),
        agreed=(),
        finished=(),
        failures=(),
        moved=(),
        growing=False,
        grows_in_memory=False,
        resized=False,
    )


def _assign(table: Table, owners: dict[int, str], **changes: object) -> Table:
    """Change the owners. Once workers have run, those that have arrived must do so again: they accept the owners."""
    arrived = () if table.begun else tuple(node for node in table.arrived if node in owners.values())
    return _change(
        table, owners=dict(sorted(owners.items())), arrived=arrived, agreed=(), proposal=table.proposal + 1, **changes
    )


def _change(table: Table, **changes: object) -> Table:
    return msgspec.structs.replace(table, **changes)
