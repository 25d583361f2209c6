"""Snapshots in the memory of the nodes, as the loop sees them; `keepwarm.ft.worker.in_memory` does the work."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from keepwarm.ft.errors import ForeignSnapshot, FtError
from keepwarm.ft.worker.in_memory import Deployment, InMemoryCheckpointer
from keepwarm.ft.worker.snapshotter import Restoration
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint.checkpoint import OPTIONAL, layout_hash
from keepwarm.trainer.distributed.in_process_restart import EPOCH
from keepwarm.trainer.distributed.random_state import RandomState
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.errors import CheckpointError, RestoreFailed
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.loop.callback import Callback, Ending, Run, StepDone
from keepwarm.trainer.monitor import events


class MemoryTier(Callback):
    """State in the memory of the nodes, as a start and the loop see it. This one, of `snapshot: off`, holds none."""

    @property
    def epoch(self) -> int:
        """Grows by one with every start of the workers; orders checkpoints of one step."""
        return 0

    def begin_fresh(self) -> None:
        """Make ready to take snapshots, without restoring anything. Collective. Raises RestoreFailed."""

    def restore(self) -> Restoration | str:
        """Write the committed state into the live shards; else return why there is none. Collective.

        Raises:
            CheckpointError: the snapshot is of another model.
            RestoreFailed: agents or peers were lost on the way; another start may succeed.
        """
        return "no snapshots in memory: snapshot is off"

    def when_resumed(self, report: Callable[[], None]) -> None:
        """Call `report` once the first step after a recovery is done, as far as this tier can tell."""
        report()

    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds of the last `restore` on this rank by phase."""
        return {}

    def decoded(self) -> int:
        """Bytes of chunks that were decoded for the present start, data and parity, on all nodes."""
        return 0


class Snapshots(MemoryTier):
    """Takes a snapshot after a step when one is due, and joins the copy before the next update."""

    def __init__(self, job: JobSpec, world: World, state: Mapping[str, Shard], random: RandomState) -> None:
        """Start the agents that do not run yet, and attach to this node's. Collective.

        Args:
            state: live shards; their names, shapes and memory stay what they are for the life of the engine.

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
        )
        self.checkpointer = InMemoryCheckpointer(
            job.snapshot, state, deployment, capture=random.capture, optional=OPTIONAL
        )
        self._resumed: Callable[[], None] | None = None
        self._reported: str | None = None

    # ---- at a start

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
            run.console.warn("one node alone has no parity: its loss is survived by the durable checkpoint only")

    def before_update(self, run: Run) -> None:
        """Join the running copy.

        Raises `RestoreFailed` when what was restored at the start turns out to have rotted on the way.
        """
        with _restore_failures(self._rank):
            self.checkpointer.join()

    def after_step(self, run: Run, done: StepDone) -> None:
        if self._resumed is not None:
            self._resumed()
            self._resumed = None
        self.checkpointer.maybe_snapshot(run.state.step, lambda: json.dumps(run.meta()).encode(), done.seconds)
        error = self.checkpointer.last_error
        if error is not None and error != self._reported:
            run.metrics.event(events.SnapshotFailed(step=run.state.step, reason=error))
            run.console.warn(f"no snapshot: {error}; training goes on")
        self._reported = error

    def close(self, run: Run, ending: Ending) -> None:
        """Leave the agent. After a failure its memory stays: the next start is restored from it."""
        if ending == "halted":
            self.checkpointer.abandon()
        elif ending != "failed":
            # The job is over, or its state is on disk: the agents' memory is not needed any more.
            run.metrics.event(msgspec.convert(self.checkpointer.timings(), events.Snapshots))
            with _restore_failures(self._rank):
                self.checkpointer.close(finished=True)


def _settled_epoch() -> int:
    """The epoch that this node's supervisor has had the agents begin; 0: none."""
    return int(os.environ.get(EPOCH, "0"))


@contextlib.contextmanager
def _restore_failures(rank: int) -> Iterator[None]:
    """A snapshot of another model is the user's to solve; what was lost on the way may be there at another start."""
    try:
        yield
    except ForeignSnapshot as error:
        raise CheckpointError(f"rank {rank}: restoring from memory failed: {error}") from error
    except FtError as error:
        raise RestoreFailed(f"rank {rank}: restoring from memory failed: {error}") from error
