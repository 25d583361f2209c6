"""Who owns which slot of a job, and when its workers may start: the decisions, pure and torch-free.

One `Table` describes all nodes of a run. Every change is a function from a table to the next one; the shell
(`keepwarm.launch.node.rendezvous`, `keepwarm.launch.node.store`) writes it by compare-and-set, so that changes come one
after the other wherever they are made. The rules:

- The number of slots is fixed. An owner keeps its slot until it is lost; a spare takes vacant slots alone. Rank
  follows from slot, so survivors keep their ranks.
- Workers run in rounds. A round is complete once every slot has an owner and every owner has arrived in it; whatever
  ends the workers of one slot begins the next round for all.
- A node that was given up is in no table. When it wakes up it finds that out before it does anything else: it is
  fenced, ends what it started, and may come back as a spare.
- Where the job allows, vacant slots that nobody takes are given up: the run goes on with fewer, from what is on disk,
  and gets them back once there are nodes for them and its workers have saved their state.
- A node whose workers end one start after another makes room for a spare, and does not come back.
"""

from typing import Literal, get_args

import msgspec

Kind = Literal["lost", "killed", "failed", "hung"]
"""What happened to the workers of a slot, the gravest first: their node is gone, a signal ended one, one gave up, one
saw that training hangs, which is no fault of its node."""
BLAMED_FOR = 86_400.0
"""Seconds for which a node is blamed for a start that ended because of its workers."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why the round before this one ended."""

    kind: Kind
    cause: str
    slot: int
    time: float
    """Seconds since 1970, when it was noticed."""
    silence: float = 0.0
    """Seconds that passed without a sign of life before it was noticed."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The run is over, for every node."""

    code: int
    reason: str


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """All that nodes agree on."""

    slots: int
    max_restarts: int
    """Rounds that may fail without a node being lost; more end the run."""
    max_node_failures: int | None = None
    """Rounds that workers of one node may end, before a spare takes its slot; None: any number."""
    sizes: tuple[int, ...] = ()
    """Numbers of slots that the job may run with, the full one first."""
    growing: bool = False
    """Workers have been asked to save their state and end, so that more slots can begin."""
    rescuer: str | None = None
    """The node that has what is in memory written to disk, before there are fewer slots."""
    saving: int = 0
    """The epoch of snapshots that all agents shall write."""
    resized: bool = False
    """This round begins with another number of slots than the last one had: nothing in memory fits it."""
    round: int = 0
    owners: dict[int, str] = {}
    """Node by slot."""
    arrived: tuple[str, ...] = ()
    """Owners that are ready to start workers in this round."""
    finished: tuple[str, ...] = ()
    """Owners whose workers have done their job in this round."""
    spares: tuple[str, ...] = ()
    """The others, the one that waits longest first."""
    failures: tuple[Failure, ...] = ()
    """Since the last round that was complete."""
    moved: tuple[int, ...] = ()
    """Slots that lost their owner since then."""
    blamed: dict[str, tuple[float, ...]] = {}
    """When rounds ended because of workers of a node, by node."""
    left_out: dict[str, str] = {}
    """Nodes that take no part any more, and why."""
    restarts: int = 0
    begun: bool = False
    """A round was complete once, so that vacant slots are those of lost nodes."""
    ended: Ended | None = None

    @property
    def complete(self) -> bool:
        """Workers run, or may start."""
        return len(self.owners) == self.slots and len(self.arrived) == self.slots

    @property
    def vacant(self) -> tuple[int, ...]:
        return tuple(slot for slot in range(self.slots) if slot not in self.owners)

    def slot_of(self, node: str) -> int | None:
        return next((slot for slot, owner in self.owners.items() if owner == node), None)

    def knows(self, node: str) -> bool:
        """False for a node that never joined, and for one that was given up."""
        return node in self.spares or self.slot_of(node) is not None

    @property
    def gravest(self) -> tuple[Failure, ...]:
        """The failures that explain the others: a lost node makes workers elsewhere fail, and so does a killed one."""
        for kind in get_args(Kind):
            found = tuple(failure for failure in self.failures if failure.kind == kind)
            if found:
                return found
        return ()


def workers_are_sound(table: Table) -> bool:
    """Whether the round before this one ended by faults from outside: workers were killed, or nodes lost.

    One that failed by itself may have done so because of what its process, or that of another, has become.
    """
    return any(failure.kind in ("lost", "killed") for failure in table.gravest)


Wish = int | Literal["any", "spare"]
"""The slot a node wants, any vacant one, or none before a node is lost."""


def join(table: Table, node: str, wish: Wish, *, after_round: int = -1) -> Table:
    """A node is here: an owner if it can be, else a spare.

    `after_round` is the last round that the node took part in under an earlier store: rounds only grow.
    """
    if after_round >= table.round:
        table = _change(table, round=after_round + 1, arrived=(), finished=(), begun=True)
    if table.knows(node) or node in table.left_out:
        return table
    slot = wish if isinstance(wish, int) and wish in table.vacant else None
    if wish == "any" or (isinstance(wish, int) and table.begun):
        slot = slot if slot is not None else min(table.vacant, default=None)
    if slot is None or table.ended is not None:
        return _change(table, spares=(*table.spares, node))
    return _change(table, owners=_owners(table, slot, node))


def fill(table: Table) -> Table:
    """Spares take the vacant slots."""
    while table.vacant and table.spares and table.ended is None:
        slot, (first, *rest) = table.vacant[0], table.spares
        # Under a store that follows another, nobody else says that the owner was lost together with the store before.
        moved = tuple(sorted({*table.moved, slot})) if table.begun else ()
        table = _change(table, owners=_owners(table, slot, first), spares=tuple(rest), moved=moved)
    return table


def rescue(table: Table, node: str) -> Table:
    """A node sees to it that what is in memory is on disk before the slots become fewer; unchanged when they cannot."""
    if table.rescuer is not None or not table.knows(node) or shrink(table) is table:
        return table
    return _change(table, rescuer=node)


def save(table: Table, node: str, epoch: int) -> Table:
    """The rescuer says that the lost slots have agents, whose memory is decoded."""
    return _change(table, saving=epoch) if table.rescuer == node else table


def shrink(table: Table) -> Table:
    """Give up slots until those that are left have owners; unchanged where no allowed number is small enough."""
    here = len(table.owners)
    size = next((size for size in table.sizes if size <= here), None)
    if not table.vacant or table.spares or size is None or not table.begun or table.ended is not None:
        return table
    return _resize(table, size)


def want_more(table: Table) -> Table:
    """Where waiting nodes allow for more slots, have the workers save their state."""
    if not table.complete or table.growing or table.ended is not None or _largest(table) <= table.slots:
        return table
    return _change(table, growing=True)


def grow(table: Table, round: int) -> Table:
    """The workers of a round have saved their state: begin the next one with as many slots as there are nodes for."""
    if not table.growing or table.round != round or table.ended is not None:
        return table
    size = _largest(table)
    table = _next_round(table)
    return _resize(table, size) if size > table.slots else table


def _largest(table: Table) -> int:
    here = len(table.owners) + len(table.spares)
    return next((size for size in table.sizes if size <= here), table.slots)


def _resize(table: Table, size: int) -> Table:
    """Owners keep their slots where these stay; the others, and then the spares, take what is vacant."""
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
        rescuer=None,
        saving=0,
        moved=(),
        arrived=(),
    )


def arrive(table: Table, node: str, round: int) -> Table:
    """The node's slot is ready for its workers of a round. The last one to arrive makes the round complete."""
    if table.slot_of(node) is None or table.round != round or node in table.arrived or table.ended is not None:
        return table
    table = _change(table, arrived=(*table.arrived, node))
    if table.complete:
        table = _blame(table)
    if not table.complete:
        return table
    at_fault = table.begun and bool(table.failures) and not table.moved and not table.resized
    restarts = table.restarts + at_fault
    if restarts > table.max_restarts:
        cause = table.gravest[0].cause
        return end(table, 4, f"{cause}, after {table.max_restarts} restarts (cluster.max_restarts)")
    return _change(table, restarts=restarts, begun=True, rescuer=None, saving=0)


def _blame(table: Table) -> Table:
    """Remember whose workers ended the round before this one; who did so too often makes room for a spare."""
    found = () if table.moved else tuple(one for one in table.gravest if one.kind in ("killed", "failed"))
    # A worker that is killed makes others fail; of those that failed, the first one may have made the others.
    for failure in found if found and found[0].kind == "killed" else found[:1]:
        node = table.owners[failure.slot]
        times = (*(at for at in table.blamed.get(node, ()) if failure.time - at < BLAMED_FOR), failure.time)
        table = _change(table, blamed={**table.blamed, node: times})
        if table.max_node_failures is not None and len(times) >= table.max_node_failures and table.spares:
            why = f"its workers ended {len(times)} starts, the last one: {failure.cause}"
            others = tuple(owner for owner in table.arrived if owner != node)
            table = _change(table, arrived=others, left_out={**table.left_out, node: why})
            table = lose(table, node, f"{node} is left out: {why}", failure.time)
    return table


def fail(table: Table, node: str, round: int, kind: Kind, cause: str, now: float) -> Table:
    """Workers of a node ended before their job was done: all workers start again in the next round."""
    slot = table.slot_of(node)
    if slot is None or table.ended is not None:
        return table
    failure = Failure(kind=kind, cause=cause, slot=slot, time=now)
    if table.round == round and table.complete:
        table = _next_round(table)
    elif table.round != round + 1 or any(known.slot == slot for known in table.failures):
        return table
    return _change(table, failures=(*table.failures, failure))


def lose(table: Table, node: str, cause: str, now: float, *, silence: float = 0.0) -> Table:
    """A node is dead, or must be taken for dead: its slot is vacant, and a spare takes it."""
    slot = table.slot_of(node)
    table = _change(table, spares=tuple(spare for spare in table.spares if spare != node))
    if slot is None or table.ended is not None:
        return table
    if table.complete:
        table = _next_round(table)
    failure = Failure(kind="lost", cause=cause, slot=slot, time=now, silence=silence)
    table = _change(
        table,
        owners={key: owner for key, owner in table.owners.items() if owner != node},
        arrived=tuple(owner for owner in table.arrived if owner != node),
        finished=tuple(owner for owner in table.finished if owner != node),
        failures=(*table.failures, failure) if table.begun else (),
        moved=tuple(sorted({*table.moved, slot})) if table.begun else (),
        rescuer=None,
        saving=0,
    )
    return fill(table) if table.begun else table


def finish(table: Table, node: str, round: int) -> Table:
    """All workers of a node have done their job; with the last node the run has ended."""
    if table.slot_of(node) is None or table.round != round or not table.complete or node in table.finished:
        return table
    table = _change(table, finished=(*table.finished, node))
    return end(table, 0, "the job is done") if len(table.finished) == table.slots else table


def end(table: Table, code: int, reason: str) -> Table:
    """The run is over; what was said first stands."""
    return table if table.ended is not None else _change(table, ended=Ended(code=code, reason=reason))


def _next_round(table: Table) -> Table:
    return _change(
        table, round=table.round + 1, arrived=(), finished=(), failures=(), moved=(), growing=False, resized=False
    )


def _owners(table: Table, slot: int, node: str) -> dict[int, str]:
    return dict(sorted({**table.owners, slot: node}.items()))


def _change(table: Table, **changes: object) -> Table:
    return msgspec.structs.replace(table, **changes)
