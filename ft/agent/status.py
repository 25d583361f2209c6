"""Agent status report (`keepwarm.ft.discovery.status`) and recent commit times."""

import collections
import dataclasses
import os
from collections.abc import Iterator

import psutil

from keepwarm.ft.agent.durable_writer import DurableWriter
from keepwarm.ft.agent.scrubber import Scrub
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.agent.worker_sessions import WorkerSessions
from keepwarm.ft.discovery.status import Commit, Held, Status
from keepwarm.ft.protocol.messages import SnapshotId
from keepwarm.ft.protocol.state import Copy, Mode, State

REMEMBERED = 32
"""Number of recent commits whose times are kept."""


class CommitTimes:
    """Time from the first grant of a snapshot on this node to its commit, in seconds."""

    def __init__(self) -> None:
        self._begun: dict[SnapshotId, float] = {}
        self.last: collections.deque[Commit] = collections.deque(maxlen=REMEMBERED)
        self.refused = collections.Counter[str]()
        """Number of requests that were refused, by `keepwarm.ft.protocol.events.Reason`."""

    def granted(self, snapshot: SnapshotId, now: float) -> None:
        self._begun.setdefault(snapshot, now)

    def committed(self, snapshot: SnapshotId, now: float) -> float:
        """Return the snapshot's commit time in seconds, or 0 if no worker of this node took part in it."""
        seconds = now - self._begun.pop(snapshot, now)
        self.last.append(Commit(epoch=snapshot.epoch, step=snapshot.step, committed=seconds))
        return seconds

    def forget(self, snapshot: SnapshotId) -> None:
        self._begun.pop(snapshot, None)


def status(
    shell: Shell, sessions: WorkerSessions, commits: CommitTimes, scrub: Scrub, durable: DurableWriter | None
) -> Status:
    """Return the status shown by `keepwarm snapshots`."""
    state, memory = shell.state, shell.memory
    process = psutil.Process().memory_info()
    return Status(
        run=state.run,
        slot=state.slot,
        pid=os.getpid(),
        keeper=os.getppid(),
        incarnation=state.incarnation,
        epoch=state.epoch,
        mode=state.mode.value,
        group=state.group.members,
        parity=state.group.parity,
        peers=tuple(sorted(shell.network.links)),
        workers=tuple(sorted(sessions.workers)),
        buffers=len(memory.data),
        buffer_bytes=memory.shape.data_bytes,
        memory_bytes=memory.bytes,
        grown_bytes=memory.growth.bytes,
        resident_bytes=process.rss - process.shared,
        held=tuple(_held(copy) for copy in state.copies),
        committed=max((each.age for each in _known_committed(state)), default=None),
        commits=tuple(commits.last),
        refused=dict(commits.refused),
        durable=dataclasses.asdict(durable.report) if durable is not None else {},
        scrub={"checked": scrub.checked, "damaged": scrub.damaged},
    )


def _known_committed(state: State) -> Iterator[SnapshotId]:
    """Yield the snapshots that were committed or restored, as far as this agent knows."""
    yield from (each for each in (state.committed, state.decided) if each is not None)
    if state.mode is Mode.JOINING:  # what the last agent knew
        yield from (copy.snapshot for copy in state.copies if copy.candidate and copy.precious)


def _held(copy: Copy) -> Held:
    return Held(
        epoch=copy.snapshot.epoch,
        step=copy.snapshot.step,
        layout=copy.snapshot.layout,
        phase=copy.phase.value,
        data=copy.data,
        parity=copy.parity,
        chunks={stripe: f"{record.digest:016x}" for stripe, record in sorted(copy.good.items())},
    )
