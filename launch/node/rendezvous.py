"""The rendezvous of torch's elastic agent, by slots: an owner keeps its slot and so its ranks, spares wait inside.

Registered under the name `keepwarm`. The decisions are in `keepwarm.launch.node.slot_table`, the store in
`keepwarm.launch.node.membership`; this is what lies between them and the elastic agent's interface.
"""

import time
from collections.abc import Callable

from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.node import slot_table
from keepwarm.launch.node.membership import STORE_POLL_INTERVAL_S, Membership
from keepwarm.launch.node.slot_table import Table, Wish

BACKEND = "keepwarm"
END_POLL_INTERVAL_S = 1.0
"""Seconds between two looks for an end of the run elsewhere."""


class Fenced(LaunchError):
    """This node was given up: another one may have its slot."""

    exit_code = ExitCode.UNRECOVERABLE


class NoSpareLeft(LaunchError):
    """A slot stayed vacant for too long."""

    exit_code = ExitCode.UNRECOVERABLE


class LeftOut(LaunchError):
    """Workers of this node ended one start after another: a spare has its slot."""

    exit_code = ExitCode.UNRECOVERABLE


def _ignore(*_: object) -> None:
    return


class SlotRendezvous(RendezvousHandler):
    """One node's place in the run."""

    def __init__(self, membership: Membership, run: str, *, wish: Wish, patience: float, shrink_after: float) -> None:
        """`patience`: seconds that a slot may stay vacant before the run is given up.

        `shrink_after`: before it goes on with fewer slots, where the table has allowed sizes.
        """
        self.membership, self._run, self._wish, self._patience = membership, run, wish, patience
        self._shrink_after = shrink_after
        self.slot: int | None = None
        self.round = -1
        """Of the workers that this node has started last."""
        self.table: Table | None = None
        """As it was when the round was complete."""
        self.prepare: Callable[[int], None] = _ignore
        """Called with the slot before this node says that it is ready for a round."""
        self.waiting: Callable[[str, int | None], None] = _ignore
        """Told the state that this node waits in, and its slot."""
        self.asked_to_leave: Callable[[], bool] = lambda: False
        self.resized: Callable[[Table], None] = _ignore
        """Told the table when this node has changed the number of slots."""
        self.rescue: Callable[[], None] = _ignore
        """Called when this node is to have memory written to disk; returns when that is done, or cannot be."""
        self.save: Callable[[int], None] = _ignore
        """Called with the epoch of snapshots that this node's agent shall write."""
        self._saved = 0
        self._member = False
        self._next_look = 0.0

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._run

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait, as a spare for as long as it takes, until a round is complete in which this node has a slot.

        Raises:
            RendezvousClosedError: the run has ended, or this node was asked to leave.
            RunEnded: it has ended without this node.
            StoreLost, Fenced, LeftOut, NoSpareLeft: this node cannot go on as it is.
        """
        vacant_since: float | None = None
        while True:
            table = self.membership.read()
            if table.ended is not None:
                raise RendezvousClosedError(table.ended.reason)
            if self.asked_to_leave():
                self._leave()
            slot = table.slot_of(self.membership.node)
            if self.membership.node in table.left_out:
                raise LeftOut(f"{self.membership.node} is left out: {table.left_out[self.membership.node]}")
            if not table.knows(self.membership.node):
                self._join()
                continue
            self.slot = slot
            if slot is not None and table.complete and table.round > self.round:
                return self._start(table, slot)
            if table.growing and table.round == self.round:
                time.sleep(STORE_POLL_INTERVAL_S)  # the node of rank 0 says when all is saved
                continue
            if slot is not None and table.complete:
                self.fail("failed", "its supervisor lost the store for a moment")
                continue
            if slot is not None and self.membership.node not in table.arrived:
                self.waiting("starting" if self.round < 0 else "restarting", slot)
                self.prepare(slot)
                self._arrive(table.round)
                continue
            self.waiting("spare" if slot is None else "starting" if self.round < 0 else "restarting", slot)
            vacant_since = self._fill(table, vacant_since)
            time.sleep(STORE_POLL_INTERVAL_S)

    def _arrive(self, round: int) -> None:
        self._change(lambda now: slot_table.arrive(now, self.membership.node, round))

    def _start(self, table: Table, slot: int) -> RendezvousInfo:
        self.round, self.table = table.round, table
        self.membership.say_active()
        record = self.membership.record
        assert record is not None
        address = RendezvousStoreInfo(record.host, record.port)
        return RendezvousInfo(self.membership.store, slot, table.slots, address)

    def _join(self) -> None:
        """Be an owner or a spare; what was forgotten by a table that others still know has been fenced."""
        if self._member:
            self._member = False
            raise Fenced(f"{self.membership.node}: given up by the others while it was silent")
        wish = self._wish if self.slot is None else self.slot
        after = self.round
        self._change(lambda now: slot_table.join(now, self.membership.node, wish, after_round=after))
        self._member = True

    def rejoin(self, *, fenced: bool) -> None:
        """Before the next rendezvous, after the store was lost (then the slot is kept) or the node was fenced."""
        self._member = False
        if fenced:
            self._wish, self.slot = "spare", None

    def reentered(self, number: int | None) -> None:
        """The store is back: under the same number it still knows who is who, and who was given up."""
        record = self.membership.record
        self._member = record is not None and record.number == number

    def _fill(self, table: Table, since: float | None) -> float | None:
        """Give vacant slots to spares once the nodes they belong to have had their time; returns since when."""
        if not table.vacant or not self.membership.may_fill(begun=table.begun):
            return None
        if table.spares:
            self._change(slot_table.fill)
            return None
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + END_POLL_INTERVAL_S
            self.membership.check_end()
        since = time.monotonic() if since is None else since
        waited = time.monotonic() - since
        if waited > self._shrink_after and self._shrink(table):
            return None
        if waited > (max(self._patience, self._shrink_after) if table.sizes else self._patience):
            lost = ", ".join(map(str, table.vacant))
            raise NoSpareLeft(
                f"waited {waited:.0f} s for a node to take slot {lost}: no spare is left. Start as many nodes as "
                "are missing and continue with --resume: what the others hold in memory is used while their agents "
                "live, else the newest checkpoint on disk"
            )
        return since

    def _shrink(self, table: Table) -> bool:
        """Go on with fewer slots; before that, one node has what is in memory written to disk."""
        node = self.membership.node
        if table.saving and table.saving != self._saved:
            self._saved = table.saving
            self.save(table.saving)
        if not self._change(lambda now: slot_table.rescue(now, node))[1]:
            return False
        self.rescue()
        # With another node lost meanwhile there is another memory to rescue.
        return self._resize(lambda now: slot_table.shrink(now) if now.rescuer == node else now)

    def save_all(self, epoch: int) -> None:
        """Have the agents of all nodes write what an epoch restores; said by the node that rescues."""
        self._saved = epoch
        self._change(lambda now: slot_table.save(now, self.membership.node, epoch))

    def num_nodes_waiting(self) -> int:
        """1 when workers must start again; spares are not waiting, they are where they belong."""
        table = self.membership.read()
        gone = table.ended is not None and table.ended.code == ExitCode.UNRECOVERABLE
        return int(gone or (table.ended is None and table.round != self.round))

    def fail(self, kind: slot_table.Kind, cause: str) -> bool:
        """Workers of this node have failed in its round; True when nobody had noticed anything before."""
        before = self.round
        table, changed = self._change(
            lambda now: slot_table.fail(now, self.membership.node, before, kind, cause, time.time())
        )
        return changed and len(table.failures) == 1

    def want_more(self) -> bool:
        """Whether workers shall save their state so that more slots can begin; said by slot 0, seen by all."""
        if self.slot == 0:
            self._change(slot_table.want_more)
        table = self.membership.read()
        return table.growing and table.round == self.round

    def saved(self) -> None:
        """The workers of this node have saved their state and ended, because more slots are to begin."""
        if self.slot == 0:
            self._resize(lambda now: slot_table.grow(now, self.round))

    def _resize(self, step: Callable[[Table], Table]) -> bool:
        table, changed = self._change(step)
        if changed:
            self.resized(table)
        return changed

    def finish(self) -> Table:
        """The node's workers are done: wait for those of all others, or for a reason to start again."""
        self._change(lambda now: slot_table.finish(now, self.membership.node, self.round))
        while True:
            table = self.membership.read()
            if table.ended is not None or table.round != self.round:
                return table
            time.sleep(STORE_POLL_INTERVAL_S)

    def end(self, code: int, reason: str) -> Table:
        """The run is over for all."""
        return self._change(lambda now: slot_table.end(now, code, reason))[0]

    def ended(self) -> slot_table.Ended | None:
        return self.membership.read().ended

    def give_up_slot(self, why: str) -> None:
        """This node leaves; nothing changes when the run has ended."""
        node = self.membership.node
        self._change(lambda now: slot_table.lose(now, node, f"{node}: {why}", time.time()))

    def _leave(self) -> None:
        self.give_up_slot("asked to leave")
        raise RendezvousClosedError(f"{self.membership.node} was asked to leave")

    def _change(self, step: Callable[[Table], Table]) -> tuple[Table, bool]:
        return self.membership.change(step)

    def is_closed(self) -> bool:
        return self.ended() is not None

    def set_closed(self) -> None:
        self.end(4, f"{self.membership.node} closed the run")

    def shutdown(self) -> bool:
        self.membership.leave(politely=True)
        return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    config = parameters.config
    return SlotRendezvous(
        config["membership"],
        parameters.run_id,
        wish=config["wish"],
        patience=float(config["patience"]),
        shrink_after=float(config["shrink_after"]),
    )


rendezvous_handler_registry.register(BACKEND, _create)


def make(
    membership: Membership, run: str, nodes: int, *, wish: Wish, patience: float, shrink_after: float
) -> SlotRendezvous:
    """The handler, from torch's registry of rendezvous backends."""
    parameters = RendezvousParameters(
        BACKEND, "", run, nodes, nodes, membership=membership, wish=wish, patience=patience, shrink_after=shrink_after
    )
    handler = rendezvous_handler_registry.create_handler(parameters)
    assert isinstance(handler, SlotRendezvous)
    return handler
