"""Rendezvous of torch's elastic agent by slots: an owner keeps its slot and so its ranks; spares wait inside.

The decisions are in `keepwarm.launch.node.slot_table` and the store in `keepwarm.launch.node.membership`; this module
adapts them to the interface of the elastic agent.
"""

import contextlib
import time
from collections.abc import Collection

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.node import shared_table, slot_table
from keepwarm.launch.node.hooks import Hooks
from keepwarm.launch.node.membership import STORE_POLL_INTERVAL_S, ChangeRefused, Membership, StoreLost
from keepwarm.launch.node.shared_table import Change
from keepwarm.launch.node.slot_table import FIRST_GRACE_S, RequestedSlot, Table
from keepwarm.launch.node.view import name_of

NAME_TIMEOUT_S = 30.0
"""How long a supervisor waits for another one of the same name to be given up."""
END_POLL_INTERVAL_S = 1.0
"""How often to check whether the run has ended under another store."""


class Fenced(LaunchError):
    """This node was given up; another one may own its slot."""

    exit_code = ExitCode.UNRECOVERABLE


class NoSpareLeft(LaunchError):
    """A slot stayed vacant too long."""

    exit_code = ExitCode.UNRECOVERABLE


class Excluded(LaunchError):
    """Workers of this node failed too often; a spare has its slot."""

    exit_code = ExitCode.UNRECOVERABLE


class Drained(LaunchError):
    """This node was asked to leave, and the run goes on without it."""

    exit_code = ExitCode.DONE


class NameTaken(LaunchError):
    """Another supervisor of the same name takes part in the run."""

    exit_code = ExitCode.BAD_INPUT


class OthersMayGoOn(LaunchError):
    """Too few owners are left here to go on, and those that are missing may do so elsewhere."""

    exit_code = ExitCode.UNRECOVERABLE


class SlotRendezvous(RendezvousHandler):
    """One node's place in the run."""

    def __init__(
        self, membership: Membership, run: str, hooks: Hooks, *, requested_slot: RequestedSlot, vacancy_timeout: float,
        shrink_after: float,
    ) -> None:  # fmt: skip
        """Create the place of one node.

        Args:
            membership: link to the store.
            run: name of the run.
            hooks: the supervisor of this node.
            requested_slot: what this node asks for when it joins.
            vacancy_timeout: seconds that a slot may stay vacant before the run is given up.
            shrink_after: seconds before the run goes on with fewer slots, if the table allows other sizes.
        """
        self.membership, self._run, self._hooks = membership, run, hooks
        self._requested_slot, self._vacancy_timeout = requested_slot, vacancy_timeout
        self._shrink_after = shrink_after
        self.slot: int | None = None
        self.restart = -1
        """The restart for which this node last started workers; -1 before the first."""
        self.table: Table | None = None
        """The table when these workers were started."""
        self._saved_epoch = 0
        self._member = False
        self._next_end_check = 0.0
        # Ranks follow from slots, so that torch's agent exchanges nothing; workers reach the store by `StoreProxy`.
        self._store = HashStore()

    def get_backend(self) -> str:
        return "keepwarm"

    def get_run_id(self) -> str:
        return self._run

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until all nodes are ready for a restart in which this node has a slot; a spare waits without a deadline.

        Raises:
            RendezvousClosedError: the run has ended, or this node was asked to leave.
            RunEnded: it has ended without this node.
            Drained: the run goes on without this node, which was asked to leave.
            StoreLost, Fenced, Excluded, NoSpareLeft, NameTaken, OthersMayGoOn: this node cannot go on as it is.
        """
        waiting_since: float | None = None
        while True:
            table = self.membership.read()
            if table.ended is not None:
                raise RendezvousClosedError(table.ended.reason)
            if self._hooks.leave_requested():
                self._leave()
            slot, name = table.slot_of(self.membership.node), name_of(self.membership.node)
            if self.membership.node in table.drained:
                raise Drained(f"{name} was drained: it has left the run, which goes on without it")
            if name in table.excluded:
                raise Excluded(f"{name} is excluded: {table.excluded[name]}")
            if not table.knows(self.membership.node) or self.membership.node in table.absent:
                self._join(table)
                continue
            self.slot = slot
            if slot is not None and table.complete and table.restart > self.restart:
                return self._start(table, slot)
            if (table.growing or table.draining is not None) and table.restart == self.restart:
                time.sleep(STORE_POLL_INTERVAL_S)  # the node of rank 0 announces when all is saved
                continue
            if slot is not None and table.complete:
                self.fail("failed", "its supervisor briefly lost the store")
                continue
            # While others may go on elsewhere, they may have given the slot to another node, whose agent has it.
            if slot is not None and self.membership.node not in table.arrived and table.decides:
                self._hooks.on_waiting("starting" if self.restart < 0 else "restarting", slot)
                self._hooks.prepare(slot)
                self._arrive(table)
                continue
            if slot is None and table.awaits(self.membership.node):
                self._arrive(table)
                continue
            self._save_if_asked(table)
            waiting = "spare" if slot is None else "starting" if self.restart < 0 else "restarting"
            self._hooks.on_waiting(waiting, slot)
            waiting_since = self._wait_for_nodes(table, waiting_since)
            time.sleep(STORE_POLL_INTERVAL_S)

    def _arrive(self, table: Table) -> None:
        self.membership.accept(table)
        self._change(shared_table.Arrive(restart=table.restart, view=table.number))

    def _start(self, table: Table, slot: int) -> RendezvousInfo:
        self.restart, self.table = table.restart, table
        record = self.membership.record
        assert record is not None
        address = RendezvousStoreInfo(record.host, record.port)
        return RendezvousInfo(self._store, slot, table.slots, address)

    def _join(self, table: Table) -> None:
        """Become an owner or a spare; raise `Fenced` if the table that this node had joined no longer lists it."""
        node = self.membership.node
        if self._member and not table.knows(node):
            self._member = False
            if slot_table.namesake(table, node) is not None:
                raise NameTaken(f"{name_of(node)}: a later supervisor of this name has taken over; this one ends")
            raise Fenced(f"{name_of(node)}: given up by the other nodes after it stopped responding")
        requested = self._requested_slot if self.slot is None else self.slot
        join = shared_table.Join(
            member=self.membership.me, requested_slot=requested, known=self.membership.known(self.restart)
        )
        end = time.monotonic() + NAME_TIMEOUT_S
        while True:
            try:
                self._change(join)
            except ChangeRefused as error:
                if self.membership.outdated:
                    raise StoreLost(f"{name_of(node)}: {error}") from error
                if time.monotonic() > end or self._hooks.leave_requested():
                    raise NameTaken(
                        f"{name_of(node)}: {error}; give every supervisor a name of its own with --node, or end the "
                        "other one"
                    ) from error
                time.sleep(END_POLL_INTERVAL_S)
                continue
            self._member = True
            return

    def rejoin(self, *, fenced: bool) -> None:
        """Join again at the next rendezvous: as a spare if this node was fenced, else with its slot."""
        self._member = False
        if fenced:
            self._requested_slot, self.slot = "spare", None

    def on_reconnected(self, number: int | None) -> None:
        """Note the present store; one of the same `number` as before still knows its members, and who was given up."""
        record = self.membership.record
        self._member = record is not None and record.number == number

    def _wait_for_nodes(self, table: Table, since: float | None) -> float | None:
        """Return since when a slot is vacant, or too few owners are here to go on; raise if that takes too long."""
        if not table.vacant and table.decides:
            return None
        if time.monotonic() > self._next_end_check:
            self._next_end_check = time.monotonic() + END_POLL_INTERVAL_S
            self.membership.check_end()
        since = time.monotonic() if since is None else since
        waited = time.monotonic() - since - (0 if table.begun else FIRST_GRACE_S)
        patience = max(self._vacancy_timeout, self._shrink_after) if table.sizes else self._vacancy_timeout
        if not table.decides:
            why = f"too few of the last owners are here; {', '.join(table.waits_for)} may go on without them"
            self._hooks.on_others_missing(why)
            if waited > patience:
                raise OthersMayGoOn(f"waited {waited:.0f} s: {why}. Start the missing nodes and continue with --resume")
            return since
        if waited > self._shrink_after and self._shrink(table):
            return None
        if waited > patience:
            lost = ", ".join(map(str, table.vacant))
            raise NoSpareLeft(
                f"waited {waited:.0f} s for a node to take slot {lost}: no spare is left. Start the missing nodes and "
                "continue with --resume, which uses the memory of the other nodes while their agents live, else the "
                "newest checkpoint on disk"
            )
        return since

    def _shrink(self, table: Table) -> bool:
        """Go on with fewer slots, after one node has made sure of memory; return whether this node did that."""
        if (
            slot_table.claim_flush(table, self.membership.node) == table
            or not self._change(shared_table.ClaimFlush())[1]
        ):
            return False
        kept = self._hooks.secure_memory()
        step = shared_table.Shrink() if kept is None else shared_table.Shrink(epoch=kept[0], step=kept[1])
        return self._resize(step)

    def _save_if_asked(self, table: Table) -> None:
        if table.flush_epoch and table.flush_epoch != self._saved_epoch:
            self._saved_epoch = table.flush_epoch
            self._hooks.save_snapshot(table.flush_epoch, former=table.flush_former)

    def save_on_all_nodes(self, epoch: int, *, former: bool) -> None:
        """Have the agents of all other nodes write the snapshot of `epoch`; called by the node that flushes."""
        self._saved_epoch = epoch
        self._change(shared_table.AnnounceFlush(epoch=epoch, former=former))

    @property
    def holds_former(self) -> bool:
        """Whether agents of the layout before hold the state."""
        return self.membership.read().former is not None

    def settle(self) -> None:
        """Have the agents of the layout before this one end: their state is safe elsewhere."""
        self._change(shared_table.Settle(generation=self.membership.read().generation))

    def num_nodes_waiting(self) -> int:
        """Return 1 when workers must restart, else 0. Spares do not count: they are where they belong."""
        table = self.membership.read()
        gone = table.ended is not None and table.ended.code == ExitCode.UNRECOVERABLE
        return int(gone or (table.ended is None and table.restart != self.restart))

    def fail(self, kind: slot_table.Kind, cause: str, at_fault: Collection[int] = ()) -> bool:
        """Record that workers of this node have failed; return True if this is the first failure of the restart.

        `at_fault`: of a hang, the slots that the others wait for.
        """
        fail = shared_table.Fail(restart=self.restart, kind=kind, cause=cause, at_fault=tuple(at_fault))
        table, changed = self._change(fail)
        return changed and len(table.failures) == 1

    def growth_requested(self) -> bool:
        """Return whether workers must hand over their state so that the run can grow; slot 0 decides for all."""
        if self.slot == 0 and slot_table.may_grow(self.membership.read()):
            self._change(shared_table.RequestGrowth(in_memory=self._hooks.may_grow_in_memory()))
        table = self.membership.read()
        return table.growing and table.restart == self.restart

    @property
    def grows_in_memory(self) -> bool:
        """Whether they are to commit it in memory, and not to save it on disk."""
        return self.membership.read().grows_in_memory

    def grow_on_disk(self) -> None:
        """Have workers save their state on disk that could not commit it in memory."""
        self._change(shared_table.RequestGrowth(in_memory=False))

    def hand_over_requested(self) -> bool:
        """Return whether the workers must hand over their state so that a node can leave."""
        table = self.membership.read()
        return table.draining is not None and table.restart == self.restart

    def leave_if_possible(self, waited: float) -> bool:
        """Announce that this node was asked to end `waited` seconds ago, and leave as soon as the others can go on.

        Return whether it is to end at once, with the workers of all nodes if it has any.
        """
        table, node = self.membership.read(), self.membership.node
        if table.knows(node) and node not in table.terminated:
            table, _ = self._change(shared_table.Terminated())
        choice = slot_table.after_termination(table, node, waited)
        if choice == "leave":
            with contextlib.suppress(ChangeRefused):
                self._change(shared_table.Drain(node=node))
        return choice == "end"

    def on_saved(self, *, on_disk: bool) -> None:
        """Grow the run, or let a node leave: the workers of this node have handed over their state and ended."""
        if self.slot == 0 and self.hand_over_requested():
            self._resize(shared_table.HandOver(restart=self.restart, on_disk=on_disk))
        elif self.slot == 0:
            kept, restart = self._hooks.secure_growth(), self.restart
            if isinstance(kept, str):
                self._resize(shared_table.Grow(restart=restart, saved=kept == "disk"))
            else:
                self._resize(shared_table.Grow(restart=restart, epoch=kept[0], step=kept[1]))

    def _resize(self, step: shared_table.Shrink | shared_table.Grow | shared_table.HandOver) -> bool:
        table, changed = self._change(step)
        if changed and table.resized:
            self._hooks.on_resized(table)
        return changed

    def finish(self) -> Table:
        """Record that this node's workers have finished; wait for all others, or for a reason to restart."""
        self._change(shared_table.Finish(restart=self.restart))
        while True:
            table = self.membership.read()
            if table.ended is not None or table.restart != self.restart:
                return table
            time.sleep(STORE_POLL_INTERVAL_S)

    def end(self, code: int, reason: str) -> Table:
        """End the run for all nodes."""
        return self._change(shared_table.End(code=code, reason=reason))[0]

    def ended(self) -> slot_table.Ended | None:
        return self.membership.read().ended

    def give_up_slot(self, why: str, *, excluded: bool = False) -> None:
        """Leave the run, never to come back if `excluded`; nothing changes if it has ended."""
        self._change(shared_table.GiveUp(why=why, excluded=excluded))

    def _leave(self) -> None:
        self.give_up_slot("asked to leave")
        raise RendezvousClosedError(f"{name_of(self.membership.node)} was asked to leave")

    def _change(self, change: Change) -> tuple[Table, bool]:
        return self.membership.change(change)

    def is_closed(self) -> bool:
        return self.ended() is not None

    def set_closed(self) -> None:
        self.end(4, f"{name_of(self.membership.node)} closed the run")

    def shutdown(self) -> bool:
        self.membership.leave(farewell=True)
        return True
