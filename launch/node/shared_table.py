"""What nodes ask of the store, and how the table of `keepwarm.launch.node.slot_table` answers. Pure and torch-free.

A request is checked before it changes anything: one that is not of these types, or does not fit, is refused.
"""

from collections.abc import Callable

import msgspec

from keepwarm.launch.node import slot_table
from keepwarm.launch.node.slot_table import Kept, Kind, Known, RequestedSlot, Table
from keepwarm.launch.node.view import Member, Number, View, name_of


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of every connection that stays open."""

    node: str
    heartbeat: bool


class Standing(msgspec.Struct, frozen=True, tag=True):
    """Asks a store for its `Stand`; needs no greeting."""


class Stand(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a store is followed for."""

    number: int
    decides: bool
    """Only the nodes that follow it may go on."""
    view: Number | None
    """The last view that was installed."""


class Join(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    member: Member
    requested_slot: RequestedSlot
    known: Known


class Arrive(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    restart: int
    view: Number
    """The proposed owners, which the node has accepted."""


class Fail(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    restart: int
    kind: Kind
    cause: str
    at_fault: tuple[int, ...] = ()
    """Of a hang: the slots that the others wait for."""


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    restart: int


class End(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    code: int
    reason: str


class GiveUp(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The node leaves the run and decides nothing more."""

    why: str
    excluded: bool = False
    """It must not come back."""


class ClaimFlush(msgspec.Struct, frozen=True, tag=True):
    pass


class AnnounceFlush(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    epoch: int
    former: bool = False
    """It is a decision of the agents of the layout before."""


class Shrink(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The state is on disk, or in the memory of all agents as of this decision."""

    epoch: int | None = None
    step: int = 0


class Settle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The agents of the layout before this one are not needed any more."""

    generation: int


class RequestGrowth(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    in_memory: bool
    """Workers are to commit their state in memory, and not to save it on disk."""


class Grow(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Workers have ended. Their state is on disk, or in the memory of all agents as of this decision."""

    restart: int
    saved: bool = True
    """It is there for certain."""
    epoch: int | None = None
    step: int = 0


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A node is to leave without a loss: `keepwarm drain`."""

    node: str
    stop: bool = False
    """It is to stay after all."""


class Terminated(msgspec.Struct, frozen=True, tag=True):
    """The node was asked to end by SIGTERM."""


class HandOver(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    restart: int
    on_disk: bool
    """The state is on disk and not only in memory."""


Change = (
    Join | Arrive | Fail | Finish | End | GiveUp | ClaimFlush | AnnounceFlush | Shrink | RequestGrowth | Grow | Drain
    | Terminated | HandOver | Settle
)  # fmt: skip


class Request(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Asks the store for a change; answered by `Answer`, after the table if the node does not have it yet."""

    number: int
    change: Change


class Update(msgspec.Struct, frozen=True, tag=True):
    """The table as it is now; sent to every node when it changes."""

    table: Table


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    number: int
    changed: bool
    refused: str = ""


class Refused(ValueError):
    """The change is not possible; the message says why."""


def apply(table: Table, node: str, change: Change, now: float) -> Table:
    """Return the table after a node's request.

    Raises:
        Refused: another start of the same node's supervisor is in the table, or a node cannot be drained.
    """
    return _STEPS[type(change)](table, node, change, now)


def _join(table: Table, node: str, change: Join, now: float) -> Table:
    if change.member.node != node:
        raise Refused(f"{name_of(node)} cannot join for {name_of(change.member.node)}")
    if (other := slot_table.namesake(table, node)) is not None and name_of(node) not in table.excluded:
        raise Refused(f"a supervisor of the name {name_of(other)} is part of the run already")
    if change.known.installed is not None and change.known.installed.number[0] > table.store:
        raise Refused(f"store {change.known.installed.number[0]} has replaced store {table.store}")
    table = slot_table.follow(table, change.member, change.known)
    return slot_table.join(table, node, change.requested_slot, seen_restart=change.known.restart)


def _arrive(table: Table, node: str, change: Arrive, now: float) -> Table:
    # Before workers have run, others may still join: there is nothing to accept yet.
    accepted = change.view == table.number or not table.begun
    return slot_table.arrive(table, node, change.restart) if accepted else table


def _shrink(table: Table, node: str, change: Shrink, now: float) -> Table:
    # If another node was lost meanwhile, there is another memory to flush.
    if table.flushing_node != node:
        return table
    kept = None if change.epoch is None else Kept(node=node, epoch=change.epoch, step=change.step)
    return slot_table.shrink(table, kept)


def _grow(table: Table, node: str, change: Grow, now: float) -> Table:
    kept = None if change.epoch is None else Kept(node=node, epoch=change.epoch, step=change.step)
    return slot_table.grow(table, change.restart, kept, saved=change.saved)


def _drain(table: Table, node: str, change: Drain, now: float) -> Table:
    if change.stop:
        return slot_table.stop_draining(table, change.node)
    if why := slot_table.refusal_to_drain(table, change.node):
        raise Refused(why)
    return slot_table.drain(table, change.node, now)


def _fail(table: Table, node: str, change: Fail, now: float) -> Table:
    if change.kind == "hung":
        return slot_table.hang(table, node, change.restart, change.at_fault, change.cause, now)
    return slot_table.fail(table, node, change.restart, change.kind, change.cause, now)


def _give_up(table: Table, node: str, change: GiveUp, now: float) -> Table:
    if change.excluded:
        return slot_table.exclude(table, node, change.why, now, dead=True)
    return slot_table.lose(table, node, f"{name_of(node)}: {change.why}", now, dead=True)


_STEPS: dict[type, Callable[..., Table]] = {
    Join: _join,
    Arrive: _arrive,
    Fail: _fail,
    Finish: lambda table, node, one, now: slot_table.finish(table, node, one.restart),
    End: lambda table, node, one, now: slot_table.end(table, one.code, one.reason),
    GiveUp: _give_up,
    ClaimFlush: lambda table, node, one, now: slot_table.claim_flush(table, node),
    AnnounceFlush: lambda table, node, one, now: slot_table.announce_flush(table, node, one.epoch, former=one.former),
    Shrink: _shrink,
    RequestGrowth: lambda table, node, one, now: slot_table.request_growth(table, in_memory=one.in_memory),
    Grow: _grow,
    Drain: _drain,
    Terminated: lambda table, node, one, now: slot_table.terminate(table, node),
    Settle: lambda table, node, one, now: slot_table.settle(table, one.generation),
    HandOver: lambda table, node, one, now: slot_table.hand_over(table, one.restart, now, on_disk=one.on_disk),
}


def news(table: Table) -> object:
    """Return what all nodes are told at once when it changes; arrivals and further failures can wait.

    So the number of messages for one event does not grow with the square of the nodes.
    """
    causes = table.root_causes
    waiting = table.spares if table.begun else ()
    return (
        table.restart, table.complete, table.ended, table.growing, table.grows_in_memory, table.flushing_node,
        table.flush_epoch,
        table.resized, table.excluded, table.slots, table.owners if table.begun else None, waiting,
        causes[0].kind if causes else None, table.decides, table.draining, table.drained,
        table.terminated, table.former,
    )  # fmt: skip


def stand(table: Table) -> Stand:
    """Return what the store of this table is followed for."""
    view: View | None = table.view
    return Stand(number=table.store, decides=table.decides, view=None if view is None else view.number)
