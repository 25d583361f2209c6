"""In-memory snapshots as the loop sees them; `keepwarm.ft.worker.in_memory` implements them."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from keepwarm.ft.discovery.config import LayoutAgents
from keepwarm.ft.discovery.registry import newest_generation
from keepwarm.ft.errors import ForeignSnapshot, FtError
from keepwarm.ft.worker.in_memory import Deployment, InMemoryCheckpointer
from keepwarm.ft.worker.snapshotter import Restoration
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint.checkpoint import OPTIONAL, layout_hash
from keepwarm.trainer.distributed.in_process_restart import AGENTS, EPOCH
from keepwarm.trainer.distributed.random_state import RandomState
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.errors import CheckpointError, RestoreFailed
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.loop.callback import Callback, Ending, Run, StepDone
from keepwarm.trainer.monitor import events


class MemoryTier(Callback):
    """State kept in node memory, as seen by a start and by the loop. This base, for `snapshot: off`, keeps none."""

    @property
    def epoch(self) -> int:
        """Number that grows by one with every start of the workers; orders checkpoints of the same step."""
        return 0

    def begin_fresh(self) -> None:
        """Prepare to take snapshots without restoring anything. Collective. Raises RestoreFailed."""

    def restore(self) -> Restoration | str:
        """Write the committed state into the live shards, or return why there is none. Collective.

        Raises:
            CheckpointError: the snapshot belongs to a different model.
            RestoreFailed: agents or peers were lost meanwhile; another start may succeed.
        """
        return "no snapshots in memory: snapshot is off"

    def when_resumed(self, report: Callable[[], None]) -> None:
        """Call `report` once the first step after a recovery is done, as far as this tier can tell."""
        report()

    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds that the last `restore` took on this rank, by phase."""
        return {}

    def decoded(self) -> int:
        """Bytes of chunks, data and parity, decoded on all nodes for this start."""
        return 0


class Snapshots(MemoryTier):
    """Takes a snapshot after a step if one is due, and joins the copy before the next update."""

    def __init__(self, job: JobSpec, world: World, state: Mapping[str, Shard], random: RandomState) -> None:
        """Start missing agents, and attach to the agent of this node. Collective.

        Args:
            state: live shards; names, shapes and memory must stay the same for the life of the engine.

        Raises:
            PlacementError, MemoryTooSmall, AgentError: with the arithmetic, before anything was changed.
        """
        super().__init__()
        assert job.snapshot != "off"
        self._rank = world.rank
        deployment = Deployment(
            folder=Path(job.output),
            layout=layout_hash(job),
            ranks_per_node=job.layout.ranks_per_node,
            host=os.environ.get("KEEPWARM_HOST", "127.0.0.1"),
            agents=_agents(Path(job.output)),
        )
        self.checkpointer = InMemoryCheckpointer(
            job.snapshot, state, deployment, capture=random.capture, optional=OPTIONAL
        )
        self._resumed: Callable[[], None] | None = None
        self._reported: str | None = None
        self._slow = False

    # ---- start

    @property
    def epoch(self) -> int:
        return self.checkpointer.epoch

    def begin_fresh(self) -> None:
        with _restore_failures(self._rank):
            self.checkpointer.begin_epoch(_settled_epoch())

    def restore(self) -> Restoration | str:
        with _restore_failures(self._rank):
            return self.checkpointer.restore(_settled_epoch())

    def when_resumed(self, report: Callable[[], None]) -> None:
        self._resumed = report

    @property
    def phases(self) -> Mapping[str, float]:
        return self.checkpointer.phases

    def decoded(self) -> int:
        return self.checkpointer.decoded()

    @property
    def blocked_s(self) -> float:
        return self.checkpointer.timings()["blocked_s"]

    # ---- hooks

    def on_start(self, run: Run) -> None:
        if not self.checkpointer.protected:
            run.console.warn("a single node has no parity: only the durable checkpoint survives its loss")

    def before_update(self, run: Run) -> None:
        """Join the copy in progress.

        Raises RestoreFailed if the state restored at the start turns out to be corrupt.
        """
        with _restore_failures(self._rank):
            self.checkpointer.join()

    def after_step(self, run: Run, done: StepDone) -> None:
        if self._resumed is not None:
            self._resumed()
            self._resumed = None
        self.checkpointer.maybe_snapshot(run.state.step, lambda: json.dumps(run.meta()).encode(), done.seconds)
        self._report(run)

    def exposed(self, run: Run) -> bool:
        return self.checkpointer.exposed(run.state.step)

    def protect(self, run: Run) -> None:
        """Attach to an agent that has replaced a dead one, and take a snapshot at once where memory needs one."""
        if self.checkpointer.protect(run.state.step, lambda: json.dumps(run.meta()).encode()):
            run.metrics.event(events.RedundancyLost(step=run.state.step))
        self._report(run)

    def votes(self, run: Run) -> Sequence[int]:
        return self.checkpointer.votes()

    def agreed(self, run: Run, largest: Sequence[int]) -> None:
        self.checkpointer.agreed(largest)

    def _report(self, run: Run) -> None:
        """Say once why the last snapshot was not taken. Rank 0 speaks for all, except of what only this rank knows."""
        step, folder = run.state.step, Path(run.job.output)
        error, slow = self.checkpointer.last_error, self.checkpointer.slow_copies
        if error is not None and error != self._reported:
            run.metrics.event(events.SnapshotFailed(step=step, reason=error))
            run.console.warn(f"no snapshot: {error}; training continues")
            if self._rank and self.checkpointer.copy_error is not None:
                events.append(folder, events.SnapshotFailed(step=step, reason=f"rank {self._rank}: {error}"))
        self._reported = error
        if slow is not None and not self._slow:
            self._slow = True
            events.append(folder, events.SnapshotUnlocked(step=step, rank=self._rank, reason=slow))

    def hand_over(self, run: Run) -> bool:
        """Have the last completed step committed on all nodes, whether or not a snapshot of it was due."""
        with _restore_failures(self._rank):
            error = self.checkpointer.commit_now(run.state.step, lambda: json.dumps(run.meta()).encode())
        if error is not None:
            run.metrics.event(events.SnapshotFailed(step=run.state.step, reason=error))
            run.console.warn(f"no snapshot to hand over: {error}; training continues")
        return error is None

    def close(self, run: Run, ending: Ending) -> None:
        """Detach from the agent. After a failure its memory is kept: the next start restores from it."""
        if ending == "halted":
            self.checkpointer.abandon()
        elif ending != "failed":
            # The job is done, or its state is on disk: the agents' memory is no longer needed.
            run.metrics.event(msgspec.convert(self.checkpointer.timings(), events.Snapshots))
            with _restore_failures(self._rank):
                self.checkpointer.close(finished=True)


def _settled_epoch() -> int:
    """Return the epoch that this node's supervisor had the agents begin; 0: none."""
    return int(os.environ.get(EPOCH, "0"))


def _agents(folder: Path) -> LayoutAgents:
    """Return the agents that a supervisor names, else those of the last layout of the run."""
    if (named := os.environ.get(AGENTS)) is not None:
        return msgspec.json.decode(named, type=LayoutAgents)
    return LayoutAgents(generation=newest_generation(folder))


@contextlib.contextmanager
def _restore_failures(rank: int) -> Iterator[None]:
    """Map a snapshot of a different model to an error for the user to solve, and lost data to one that a restart may
    solve.
    """
    try:
        yield
    except ForeignSnapshot as error:
        raise CheckpointError(f"rank {rank}: restoring from memory failed: {error}") from error
    except FtError as error:
        raise RestoreFailed(f"rank {rank}: restoring from memory failed: {error}") from error
