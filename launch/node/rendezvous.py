"""Rendezvous of torch's elastic agent by slots: an owner keeps its slot and so its ranks; spares wait inside.

The decisions are in `keepwarm.launch.node.slot_table` and the store in `keepwarm.launch.node.membership`; this module
adapts them to the interface of the elastic agent.
"""

import time
from collections.abc import Callable

from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.node import slot_table
from keepwarm.launch.node.hooks import Hooks
from keepwarm.launch.node.membership import STORE_POLL_INTERVAL_S, Membership
from keepwarm.launch.node.slot_table import RequestedSlot, Table

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
            StoreLost, Fenced, Excluded, NoSpareLeft: this node cannot go on as it is.
        """
        vacant_since: float | None = None
        while True:
            table = self.membership.read()
            if table.ended is not None:
                raise RendezvousClosedError(table.ended.reason)
            if self._hooks.leave_requested():
                self._leave()
            slot = table.slot_of(self.membership.node)
            if self.membership.node in table.excluded:
                raise Excluded(f"{self.membership.node} is excluded: {table.excluded[self.membership.node]}")
            if not table.knows(self.membership.node):
                self._join()
                continue
            self.slot = slot
            if slot is not None and table.complete and table.restart > self.restart:
                return self._start(table, slot)
            if table.growing and table.restart == self.restart:
                time.sleep(STORE_POLL_INTERVAL_S)  # the node of rank 0 announces when all is saved
                continue
            if slot is not None and table.complete:
                self.fail("failed", "its supervisor briefly lost the store")
                continue
            if slot is not None and self.membership.node not in table.arrived:
                self._hooks.on_waiting("starting" if self.restart < 0 else "restarting", slot)
                self._hooks.prepare(slot)
                self._arrive(table.restart)
                continue
            waiting = "spare" if slot is None else "starting" if self.restart < 0 else "restarting"
            self._hooks.on_waiting(waiting, slot)
            vacant_since = self._fill(table, vacant_since)
            time.sleep(STORE_POLL_INTERVAL_S)

    def _arrive(self, restart: int) -> None:
        self._change(lambda now: slot_table.arrive(now, self.membership.node, restart))

    def _start(self, table: Table, slot: int) -> RendezvousInfo:
        self.restart, self.table = table.restart, table
        self.membership.mark_active()
        record = self.membership.record
        assert record is not None
        address = RendezvousStoreInfo(record.host, record.port)
        return RendezvousInfo(self.membership.store, slot, table.slots, address)

    def _join(self) -> None:
        """Become an owner or a spare; raise `Fenced` if the table that this node had joined no longer lists it."""
        if self._member:
            self._member = False
            raise Fenced(f"{self.membership.node}: given up by the other nodes after it stopped responding")
        requested = self._requested_slot if self.slot is None else self.slot
        seen = self.restart
        self._change(lambda now: slot_table.join(now, self.membership.node, requested, seen_restart=seen))
        self._member = True

    def rejoin(self, *, fenced: bool) -> None:
        """Join again at the next rendezvous: as a spare if this node was fenced, else with its slot."""
        self._member = False
        if fenced:
            self._requested_slot, self.slot = "spare", None

    def on_reconnected(self, number: int | None) -> None:
        """Note the present store; one of the same `number` as before still knows its members, and who was given up."""
        record = self.membership.record
        self._member = record is not None and record.number == number

    def _fill(self, table: Table, since: float | None) -> float | None:
        """Give vacant slots to spares after the grace period of their owners; return since when one is vacant."""
        if not table.vacant or not self.membership.may_fill(begun=table.begun):
            return None
        if table.spares:
            self._change(slot_table.fill)
            return None
        if time.monotonic() > self._next_end_check:
            self._next_end_check = time.monotonic() + END_POLL_INTERVAL_S
            self.membership.check_end()
        since = time.monotonic() if since is None else since
        waited = time.monotonic() - since
        if waited > self._shrink_after and self._shrink(table):
            return None
        if waited > (max(self._vacancy_timeout, self._shrink_after) if table.sizes else self._vacancy_timeout):
            lost = ", ".join(map(str, table.vacant))
            raise NoSpareLeft(
                f"waited {waited:.0f} s for a node to take slot {lost}: no spare is left. Start the missing nodes and "
                "continue with --resume, which uses the memory of the other nodes while their agents live, else the "
                "newest checkpoint on disk"
            )
        return since

    def _shrink(self, table: Table) -> bool:
        """Go on with fewer slots, after one node has had memory written to disk; return whether this node did that."""
        node = self.membership.node
        if table.flush_epoch and table.flush_epoch != self._saved_epoch:
            self._saved_epoch = table.flush_epoch
            self._hooks.save_snapshot(table.flush_epoch)
        if not self._change(lambda now: slot_table.claim_flush(now, node))[1]:
            return False
        self._hooks.flush_to_disk()
        # If another node was lost meanwhile, there is another memory to flush.
        return self._resize(lambda now: slot_table.shrink(now) if now.flushing_node == node else now)

    def save_on_all_nodes(self, epoch: int) -> None:
        """Have the agents of all other nodes write the snapshot of `epoch`; called by the node that flushes."""
        self._saved_epoch = epoch
        self._change(lambda now: slot_table.announce_flush(now, self.membership.node, epoch))

    def num_nodes_waiting(self) -> int:
        """Return 1 when workers must restart, else 0. Spares do not count: they are where they belong."""
        table = self.membership.read()
        gone = table.ended is not None and table.ended.code == ExitCode.UNRECOVERABLE
        return int(gone or (table.ended is None and table.restart != self.restart))

    def fail(self, kind: slot_table.Kind, cause: str) -> bool:
        """Record that workers of this node have failed; return True if this is the first failure of the restart."""
        before = self.restart
        table, changed = self._change(
            lambda now: slot_table.fail(now, self.membership.node, before, kind, cause, time.time())
        )
        return changed and len(table.failures) == 1

    def growth_requested(self) -> bool:
        """Return whether workers must save their state so that the run can grow; slot 0 decides for all."""
        if self.slot == 0:
            self._change(slot_table.request_growth)
        table = self.membership.read()
        return table.growing and table.restart == self.restart

    def on_saved(self) -> None:
        """Grow the run: the workers of this node have saved their state and ended."""
        if self.slot == 0:
            self._resize(lambda now: slot_table.grow(now, self.restart))

    def _resize(self, step: Callable[[Table], Table]) -> bool:
        table, changed = self._change(step)
        if changed:
            self._hooks.on_resized(table)
        return changed

    def finish(self) -> Table:
        """Record that this node's workers have finished; wait for all others, or for a reason to restart."""
        self._change(lambda now: slot_table.finish(now, self.membership.node, self.restart))
        while True:
            table = self.membership.read()
            if table.ended is not None or table.restart != self.restart:
                return table
            time.sleep(STORE_POLL_INTERVAL_S)

    def end(self, code: int, reason: str) -> Table:
        """End the run for all nodes."""
        return self._change(lambda now: slot_table.end(now, code, reason))[0]

    def ended(self) -> slot_table.Ended | None:
        return self.membership.read().ended

    def give_up_slot(self, why: str) -> None:
        """Leave the run; nothing changes if it has ended."""
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
        self.membership.leave(farewell=True)
        return True
