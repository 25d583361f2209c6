"""Slot ownership and restarts of a run, decided by pure, torch-free functions.

One `Table` describes all nodes of a run. Every change is a function from a table to the next one, applied by
compare-and-set (`keepwarm.launch.node.shared_table`), so that changes are serialized no matter where they are made.

- The number of slots is fixed. An owner keeps its slot until it is lost; a spare takes only vacant slots. Rank follows
  from slot, so survivors keep their ranks.
- All workers start together, in restart 0, 1, 2 and so on. They start once every slot has an owner and every owner has
  arrived; anything that ends the workers of one slot begins the next restart for all.
- A node that was given up is in no table. When it wakes up it notices before it does anything else: it is fenced,
  ends what it started, and may come back as a spare.
- If the job allows, vacant slots that no node takes are given up: the run goes on with fewer slots from disk, and gets
  them back once there are enough nodes and its workers have saved their state.
- A node whose workers repeatedly end the run makes room for a spare and does not come back.
"""

from typing import Literal, get_args

import msgspec

Kind = Literal["lost", "killed", "failed", "hung"]
"""How the workers of a slot failed, root causes first: their node was lost, a signal ended one, one ended by itself, or
one detected a hang, which is not attributed to its node."""
ATTRIBUTION_WINDOW_S = 86_400.0
"""How long a failure counts against the node to which it is attributed."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a restart became necessary."""

    kind: Kind
    cause: str
    slot: int
    time: float
    """When it was detected, in seconds since 1970."""
    silence: float = 0.0
    """Seconds without a heartbeat before it was detected."""


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
    sizes: tuple[int, ...] = ()
    """Numbers of slots with which the job may run, largest first."""
    growing: bool = False
    """Workers were asked to save their state and end, so that the run can grow."""
    flushing_node: str | None = None
    """The node that coordinates writing memory to disk before the run shrinks."""
    flush_epoch: int = 0
    """The agents' decision (epoch) that all agents must write to disk; 0: none."""
    resized: bool = False
    """This restart has another number of slots than the one before: nothing in memory fits it."""
    restart: int = 0
    """How often the ranks of the run have begun again; 0 is the first start."""
    owners: dict[int, str] = {}
    """Node by slot."""
    arrived: tuple[str, ...] = ()
    """Owners that are ready to start the workers of this restart."""
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

    @property
    def complete(self) -> bool:
        """Whether workers run or may start."""
        return len(self.owners) == self.slots and len(self.arrived) == self.slots

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
    """Return whether the last failure came from outside (killed workers, lost nodes), so that survivors may be resumed.

    A worker that failed by itself may have done so because of the state of its own process or of another one.
    """
    return any(failure.kind in ("lost", "killed") for failure in table.root_causes)


RequestedSlot = int | Literal["any", "spare"]
"""The slot that a node asks for, any vacant one, or none until a node is lost."""


def join(table: Table, node: str, requested_slot: RequestedSlot, *, seen_restart: int = -1) -> Table:
    """Add a node, as an owner if possible, else as a spare.

    `seen_restart` is the last restart in which the node took part under an earlier store: restarts never go back.
    """
    if seen_restart >= table.restart:
        table = _change(table, restart=seen_restart + 1, arrived=(), finished=(), begun=True)
    if table.knows(node) or node in table.excluded:
        return table
    slot = requested_slot if isinstance(requested_slot, int) and requested_slot in table.vacant else None
    if requested_slot == "any" or (isinstance(requested_slot, int) and table.begun):
        slot = slot if slot is not None else min(table.vacant, default=None)
    if slot is None or table.ended is not None:
        return _change(table, spares=(*table.spares, node))
    return _change(table, owners=_owners(table, slot, node))


def fill(table: Table) -> Table:
    """Give vacant slots to spares."""
    while table.vacant and table.spares and table.ended is None:
        slot, (first, *rest) = table.vacant[0], table.spares
        # If the owner was lost together with the previous store, this is the only place that records it.
        moved = tuple(sorted({*table.moved, slot})) if table.begun else ()
        table = _change(table, owners=_owners(table, slot, first), spares=tuple(rest), moved=moved)
    return table


def claim_flush(table: Table, node: str) -> Table:
    """Make a node coordinate the flush to disk before the run shrinks; return `table` if it cannot shrink."""
    if table.flushing_node is not None or not table.knows(node) or shrink(table) is table:
        return table
    return _change(table, flushing_node=node)


def announce_flush(table: Table, node: str, epoch: int) -> Table:
    """Record the epoch that all agents must write: substitutes for the lost slots hold their decoded memory."""
    return _change(table, flush_epoch=epoch) if table.flushing_node == node else table


def shrink(table: Table) -> Table:
    """Give up slots until the others all have owners; return `table` if no allowed number is small enough."""
    here = len(table.owners)
    size = next((size for size in table.sizes if size <= here), None)
    if not table.vacant or table.spares or size is None or not table.begun or table.ended is not None:
        return table
    return _resize(table, size)


def request_growth(table: Table) -> Table:
    """Ask the workers to save their state if spares allow for more slots."""
    if not table.complete or table.growing or table.ended is not None or _largest(table) <= table.slots:
        return table
    return _change(table, growing=True)


def grow(table: Table, restart: int) -> Table:
    """Begin the next restart with as many slots as there are nodes for: the workers of `restart` have saved."""
    if not table.growing or table.restart != restart or table.ended is not None:
        return table
    size = _largest(table)
    table = _next_restart(table)
    return _resize(table, size) if size > table.slots else table


def _largest(table: Table) -> int:
    here = len(table.owners) + len(table.spares)
    return next((size for size in table.sizes if size <= here), table.slots)


def _resize(table: Table, size: int) -> Table:
    """Change the number of slots. Owners keep slots that remain; other owners, then spares, take the vacant ones."""
    owners = {slot: node for slot, node in table.owners.items() if slot < size}
    waiting = [node for slot, node in table.owners.items() if slot >= size] + list(table.spares)
    for slot in range(size):
        if slot not in owners and waiting:
            owners[slot] = waiting.pop(0)
    return _change(
        table,
        slots=size,
        owners=dict(sorted(owners.items())),
        spares=tuple(waiting),
        resized=True,
        flushing_node=None,
        flush_epoch=0,
        moved=(),
        arrived=(),
    )


def arrive(table: Table, node: str, restart: int) -> Table:
    """Record that a node is ready to start its workers. The last node to arrive makes the table complete."""
    if table.slot_of(node) is None or table.restart != restart or node in table.arrived or table.ended is not None:
        return table
    table = _change(table, arrived=(*table.arrived, node))
    if table.complete:
        table = _attribute(table)
    if not table.complete:
        return table
    at_fault = table.begun and bool(table.failures) and not table.moved and not table.resized
    charged_restarts = table.charged_restarts + at_fault
    if charged_restarts > table.max_restarts:
        cause = table.root_causes[0].cause
        return end(table, 4, f"{cause}, after {table.max_restarts} restarts (cluster.max_restarts)")
    return _change(table, charged_restarts=charged_restarts, begun=True, flushing_node=None, flush_epoch=0)


def _attribute(table: Table) -> Table:
    """Attribute the last failure to nodes, and exclude a node that reached its limit if a spare can replace it."""
    found = () if table.moved else tuple(one for one in table.root_causes if one.kind in ("killed", "failed"))
    # A killed worker makes others fail; among failed ones, the first may have caused the rest.
    for failure in found if found and found[0].kind == "killed" else found[:1]:
        node = table.owners[failure.slot]
        earlier = table.attributed.get(node, ())
        times = (*(at for at in earlier if failure.time - at < ATTRIBUTION_WINDOW_S), failure.time)
        table = _change(table, attributed={**table.attributed, node: times})
        if table.max_node_failures is not None and len(times) >= table.max_node_failures and table.spares:
            why = f"its workers failed {len(times)} times, most recently: {failure.cause}"
            others = tuple(owner for owner in table.arrived if owner != node)
            table = _change(table, arrived=others, excluded={**table.excluded, node: why})
            table = lose(table, node, f"{node} is excluded: {why}", failure.time)
    return table


def fail(table: Table, node: str, restart: int, kind: Kind, cause: str, now: float) -> Table:
    """Record that workers of a node ended early: all workers start again in the next restart."""
    slot = table.slot_of(node)
    if slot is None or table.ended is not None:
        return table
    failure = Failure(kind=kind, cause=cause, slot=slot, time=now)
    if table.restart == restart and table.complete:
        table = _next_restart(table)
    elif table.restart != restart + 1 or any(known.slot == slot for known in table.failures):
        return table
    return _change(table, failures=(*table.failures, failure))


def lose(table: Table, node: str, cause: str, now: float, *, silence: float = 0.0) -> Table:
    """Remove a node that is dead or must be considered dead; a spare takes its slot."""
    slot = table.slot_of(node)
    table = _change(table, spares=tuple(spare for spare in table.spares if spare != node))
    if slot is None or table.ended is not None:
        return table
    if table.complete:
        table = _next_restart(table)
    failure = Failure(kind="lost", cause=cause, slot=slot, time=now, silence=silence)
    table = _change(
        table,
        owners={key: owner for key, owner in table.owners.items() if owner != node},
        arrived=tuple(owner for owner in table.arrived if owner != node),
        finished=tuple(owner for owner in table.finished if owner != node),
        failures=(*table.failures, failure) if table.begun else (),
        moved=tuple(sorted({*table.moved, slot})) if table.begun else (),
        flushing_node=None,
        flush_epoch=0,
    )
    return fill(table) if table.begun else table


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
        table, restart=table.restart + 1, arrived=(), finished=(), failures=(), moved=(), growing=False, resized=False
    )


def _owners(table: Table, slot: int, node: str) -> dict[int, str]:
    return dict(sorted({**table.owners, slot: node}.items()))


def _change(table: Table, **changes: object) -> Table:
    return msgspec.structs.replace(table, **changes)
