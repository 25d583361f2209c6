"""The snapshot agents of one node: that of its slot, and for a while those that hold the state of the layout before.

Snapshots are coded for one layout. When the number of slots changes, the next layout gets agents of its own, and reads
from those of the layout before, which stay until it has committed. A node that is lost takes memory with it: its slot
gets a substitute agent here, for which the group decodes as it does for a spare. A node that joins has no agent of the
layout before, and its ranks read from those of others. Where memory cannot serve, agents write their parts as for a
durable checkpoint. Only what was not committed is lost.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from keepwarm.ft.discovery.config import FormerLayout, LayoutAgents
from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.launch.node.slot_table import FormerOwners, Table
from keepwarm.launch.node.snapshot_agent import SnapshotAgent

POLL_INTERVAL_S = 0.05
NOT_NEEDED = "the nodes have changed, or this one was asked to end"
Gathered = tuple[int, int]
"""The epoch that all agents have decided, and the step of which memory holds every chunk."""


class NodeAgents:
    """This node's agents, in the layout that the slot table has and in the one before it. Not thread-safe."""

    def __init__(self, make: Callable[[int], SnapshotAgent], node: str) -> None:
        """`make` creates the link to an agent of the layout with a number; `node` is this node's name."""
        self._make, self._node = make, node
        self._owners: FormerOwners | None = None
        self._generation = self._former_generation = 0
        self.present = make(0)
        """That of this node's slot."""
        self._substitutes: list[SnapshotAgent] = []
        """Those of lost slots of the same layout."""
        self._former: list[SnapshotAgent] = []
        """Those of the layout before: of this node's slot then, and of slots that were lost."""

    def follow(self, table: Table, *, wait: bool = True) -> None:
        """Keep the agents that the table needs, and end the others; `wait` until those are dead."""
        self._owners = table.former
        if table.generation != self._generation:
            layout = [self.present, *self._substitutes]
            kept = table.former is not None and table.former.generation == self._generation
            for agent in self._former if kept else [*self._former, *layout]:
                agent.discard(wait=wait)
            self._former, self._substitutes = layout if kept else [], []
            self._generation = table.generation
            self.present = self._make(table.generation)
            self._former_generation = self._generation if table.former is None else table.former.generation
        elif table.former is None:
            for agent in self._former:
                agent.discard(wait=wait)
            self._former = []
        if table.flushing_node != self._node:
            self.release()

    def release(self) -> None:
        """End the substitutes of the present layout."""
        for agent in self._substitutes:
            agent.kill()
        self._substitutes = []

    def kill(self) -> None:
        """End all agents of this node, and their memory."""
        for agent in (self.present, *self._substitutes, *self._former):
            agent.kill()
        self._substitutes, self._former = [], []

    def leave_former(self, *, on_disk: int | None = None) -> None:
        """End the former layout's agents; if `on_disk`, a step, is older than theirs, they write theirs first."""
        for agent in self._former:
            if self._owners is None or on_disk is None or on_disk >= self._owners.step:
                agent.kill()
            else:
                agent.save(self._owners.epoch)
                agent.close()
        self._former = []

    def names(self, table: Table) -> str:
        """Return what workers need to know of the agents, as JSON."""
        former, holder = table.former, None
        if former is not None:
            mine = [slot for slot, node in former.owners.items() if node == self._node]
            holder = FormerLayout(
                generation=former.generation, slots=len(former.owners), slot=min(mine, default=None),
                epoch=former.epoch,
            )  # fmt: skip
        return msgspec.json.encode(LayoutAgents(generation=table.generation, former=holder)).decode()

    def save(self, epoch: int, *, former: bool) -> None:
        """Have the agents of a layout write the snapshot on which an epoch decided."""
        for agent in self._of(former=former):
            agent.save(epoch)

    def gather(
        self, lost: Sequence[int], *, former: bool, still_needed: Callable[[], bool], deadline: float
    ) -> Gathered | str:
        """Start agents for the lost slots of a layout, and have memory complete; return the reason if it cannot be.

        Args:
            lost: slots whose agents are gone.
            former: of the layout before, else of the present one.
            still_needed: return False once there is no point in going on.
            deadline: seconds for all of it.
        """
        end = time.monotonic() + deadline
        generation = self._former_generation if former else self._generation
        there = {agent.slot for agent in self._of(former=former)}
        added = [self._make(generation) for slot in lost if slot not in there]
        for slot, agent in zip((slot for slot in lost if slot not in there), added, strict=True):
            agent.take(slot)
        (self._former if former else self._substitutes).extend(added)
        try:
            for agent in added:
                agent.ensure()
            agents = self._of(former=former)
            epoch = agents[0].begin_epoch() if agents else None
            if epoch is None:
                return "no agent is running"
            step = 0
            for agent in agents:
                while (decision := agent.decision(epoch)) is None:
                    if why := _given_up(still_needed, end, f"memory was not complete after {deadline:g} s"):
                        return why
                if isinstance(decision, str):
                    return decision
                step = decision[1]
        except (FtError, OSError) as error:
            return str(error)
        return epoch, step

    def write(
        self, gathered: Gathered, checkpoints: Path, *, former: bool, still_needed: Callable[[], bool], deadline: float
    ) -> str:
        """Have this node's agents write what was gathered, as all others do; return why it is not on disk, or nothing.

        Args:
            gathered: by `gather`.
            checkpoints: folder in which agents publish.
            former, still_needed, deadline: as for `gather`.
        """
        epoch, step = gathered
        end = time.monotonic() + deadline
        self.save(epoch, former=former)
        while not _published(checkpoints, step):
            if why := _given_up(still_needed, end, f"step {step} was not on disk after {deadline:g} s"):
                return why
        return ""

    def _of(self, *, former: bool) -> list[SnapshotAgent]:
        agents = self._former if former else [self.present, *self._substitutes]
        return [agent for agent in agents if agent.slot is not None]


def newest_step(checkpoints: Path) -> int:
    """Return the step of the newest durable checkpoint; -1 if there is none.

    Raises OSError.
    """
    with contextlib.suppress(FtError):
        newest = publication.latest(checkpoints)
        return -1 if newest is None else read_manifest(newest).step
    return -1


def _given_up(still_needed: Callable[[], bool], end: float, late: str) -> str:
    """Return why a wait is over, after a short pause if it is not."""
    if not still_needed():
        return NOT_NEEDED
    if time.monotonic() > end:
        return late
    time.sleep(POLL_INTERVAL_S)
    return ""


def _published(checkpoints: Path, step: int) -> bool:
    with contextlib.suppress(OSError):
        return newest_step(checkpoints) >= step
    return False
