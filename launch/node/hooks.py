"""The calls that rendezvous and elastic agent make into the supervisor of their node."""

from collections.abc import Mapping
from typing import Literal, Protocol

from keepwarm.launch.node.node_agents import Gathered
from keepwarm.launch.node.slot_table import Kind, Table


class Hooks(Protocol):
    """Implemented by the supervisor, which decides nothing about slots and restarts; see each method for the caller."""

    # ---- called by the rendezvous

    def leave_requested(self) -> bool:
        """Return whether this node was asked to leave the run."""

    def on_waiting(self, state: str, slot: int | None) -> None:
        """Called while this node waits for workers to start, with the state it waits in and its slot."""

    def on_others_missing(self, why: str) -> None:
        """Called while too few of the last owners are here to go on."""

    def prepare(self, slot: int) -> None:
        """Called before this node reports that it is ready to start the workers of `slot`."""

    def on_resized(self, table: Table) -> None:
        """Called after this node has changed the number of slots."""

    def secure_memory(self) -> Gathered | None:
        """Make sure of what memory holds before the run shrinks; return when that is done or has failed.

        Return the decision of the agents, all of which stay for the next layout; None: what could be saved is on disk.
        """

    def may_grow_in_memory(self) -> bool:
        """Return whether workers can hand over their state in memory so that the run grows, or must save it on disk."""

    def secure_growth(self) -> Gathered | Literal["disk", "nowhere"]:
        """Find out where workers that have ended have left their state; return once that is certain.

        Return the decision of the agents, all of which stay for the larger layout, or that the state is on disk.
        """

    def save_snapshot(self, epoch: int, *, former: bool) -> None:
        """Have this node's agent write the snapshot on which the agents of a layout agreed in `epoch`."""

    # ---- called by the elastic agent

    def environment(self) -> dict[str, str]:
        """Return the variables that all workers of the restart that begins get besides their ranks."""

    def on_started(self, workers: Mapping[int, int]) -> None:
        """Called when workers run, with their pids by rank."""

    def on_failed(self, kind: Kind, cause: str) -> None:
        """Called when a worker has failed, as far as known not because of another one."""

    def poll(self) -> None:
        """Called each time the workers are checked."""
