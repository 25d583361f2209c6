"""Snapshots in memory as the loop sees them: offered after a step, joined before the next update, restored at a start.

The worker's half of `ft`: it knows which node a rank is on and what its state is; agents do the rest.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ft.agent_config import AgentConfig, DurableConfig, GroupConfig, runtime_folder
from ft.agent_registry import AGENTS_FOLDER, TEMPLATE_FILE, Registry
from ft.auth import SECRET, create_secret, load_secret, run_identity
from ft.client import AgentClient, ensure_agent
from ft.errors import AgentError, FtError
from ft.interval import Interval
from ft.kernel import AUTO
from ft.placement import Group, groups_of
from ft.snapshot import Restoration, SnapshotOptions, Snapshotter, plan_part
from ft.snapshot_reader import RankPlace
from ft.spec import SnapshotSpec
from keepwarm.files import READABLE, atomic_write
from parallel.layout import Layout
from parallel.shard import Shard
from trainer.checkpoint import OPTIONAL
from trainer.errors import RestoreFailed
from trainer.in_process import EPOCH
from trainer.run_folder import RunFolder
from trainer.run_state import RunState
from trainer.world import World


class Snapshots:
    """One rank's link to the agent of its node. Every method is collective."""

    def __init__(
        self,
        spec: SnapshotSpec,
        folder: Path,
        world: World,
        layout: Layout,
        state: Mapping[str, Shard],
        *,
        layout_hash: str,
        capture: Callable[[], None],
    ) -> None:
        """Start the agents that do not run yet, and attach to this node's.

        Args:
            folder: the run folder, on storage that all nodes share.
            state: live shards; their names, shapes and memory stay what they are for the life of the engine.
            capture: called right before a snapshot, to bring `state` up to date with what lies elsewhere.

        Raises:
            PlacementError, MemoryTooSmall, AgentError: with the arithmetic, before anything was changed.
        """
        self._spec, self._world, self._layout, self._capture = spec, world, layout, capture
        self._state, self._layout_hash = state, layout_hash
        self._node, self._local = divmod(world.rank, layout.ranks_per_node)
        groups = groups_of(layout.nodes, spec)
        self.protected = all(group.protected for group in groups)
        """False on a single node: its memory has no parity anywhere else."""
        state_bytes = self._state_bytes(plan_part(state, world.rank, spec.bucket).size)
        if world.rank == 0:
            create_secret(folder / SECRET)
        world.barrier()
        self._secret = load_secret(folder / SECRET)
        run = run_identity(self._secret)
        self._config = _agent_config(spec, folder, run=run, slot=self._node, groups=groups, state_bytes=state_bytes)
        self._together(lambda: ensure_agent(self._config) if self._local == 0 else None)
        self._registry = Registry(folder)
        if world.rank == 0:
            _write_template(folder, self._config)
        self.resumed: Callable[[], None] | None = None
        """Called once, after the first step that follows a recovery."""
        self._attach()
        self.phases: dict[str, float] = {}
        """Seconds of the last `restore` on this rank: waiting for the agents' choice, for lost chunks, copying."""
        self._interval = Interval(mtbf=spec.mtbf)
        self._next = 0
        self._reported: str | None = None
        self._lost: str | None = None

    def _attach(self) -> None:
        """Take this rank's place at its node's agent; returns when all ranks of the node have."""
        config, layout = self._config, self._layout
        self._client = AgentClient(config.socket, run=config.run, secret=self._secret, worker=self._local)
        self._snapshotter = Snapshotter(
            self._client,
            self._state,
            RankPlace(
                rank=self._world.rank,
                world=self._world.size,
                workers=layout.ranks_per_node,
                node=self._node,
                nodes=layout.nodes,
                bucket_bytes=config.bucket_bytes,
            ),
            layout=self._layout_hash,
            options=SnapshotOptions(busy=self._spec.busy, deadline=self._spec.commit_deadline, optional=OPTIONAL),
        )

    @property
    def epoch(self) -> int:
        """Grows by one with every start of the workers; part of a snapshot's identity."""
        return self._client.epoch

    def restore(self) -> Restoration | str:
        """Begin the next epoch and write what the agents have into the live shards; else why there is nothing."""
        decided = int(os.environ.get(EPOCH, "0"))
        epoch = self._world.largest(decided or self._registry.newest_epoch() + 1 if self._world.rank == 0 else 0)
        began, waited = time.time(), time.perf_counter()
        self._client.restore(epoch, deadline=self._spec.commit_deadline)
        waited = time.perf_counter() - waited
        # The agents first verify what they hold and then choose: the file of the choice has the time of that.
        verified = min(max(0.0, self._chosen_at() - began), waited)
        fetched = time.perf_counter()
        restored = self._snapshotter.restore(epoch)
        self._agree(restored)
        self.phases = {
            "fetch": time.perf_counter() - fetched, "decode": waited - verified, "verify": verified,
        }  # fmt: skip
        return restored

    def _agree(self, restored: Restoration | str) -> None:
        """One coherent step or none: agents that had lost each other may have decided on different epochs.

        Raises `RestoreFailed` on all ranks when they were not told the same.
        """
        mine = -1 if isinstance(restored, str) else restored.epoch << 40 | restored.step
        newest, oldest = self._world.largest(mine), -self._world.largest(-mine)
        if newest != oldest:
            what = restored if isinstance(restored, str) else f"step {restored.step} of epoch {restored.epoch}"
            raise RestoreFailed(f"rank {self._world.rank}: agents do not agree on what is restored, here: {what}")

    def _chosen_at(self) -> float:
        """When the present epoch was decided, in seconds since 1970; 0 when that cannot be told."""
        with contextlib.suppress(OSError):
            return (self._registry.folder / f"choice-{self._client.epoch}.json").stat().st_mtime
        return 0.0

    def decoded(self) -> int:
        """Bytes of chunks that the present epoch's choice had decoded, data and parity, on all nodes."""
        found = 0
        with contextlib.suppress(OSError, ValueError, AttributeError):
            choice = json.loads((self._registry.folder / f"choice-{self._client.epoch}.json").read_bytes())
            for _, order in choice.get("orders", ()):
                found += len(order["targets"]) * max(order["counts"], default=0) * self._config.bucket_bytes
        return found

    def before_update(self) -> None:
        """Join the running copy: the optimizer is about to change the tensors.

        Raises `RestoreFailed` when what was restored at the start turns out to have rotted on the way.
        """
        try:
            self._snapshotter.join()
        except FtError as error:
            raise RestoreFailed(f"rank {self._world.rank}: restoring from memory failed: {error}") from error

    def offer(self, state: RunState, meta: dict[str, Any], step_seconds: float) -> None:
        """Begin a snapshot when one is due after this step; copied while training goes on."""
        if self.resumed is not None:
            self.resumed()
            self.resumed = None
        self._interval = self._interval.measured(step=step_seconds)
        if state.step < self._next:
            return
        self._mend()
        self._capture()
        if not self._client.gone:
            self._snapshotter.offer(state.step, json.dumps(meta).encode())
        self._next = state.step + self._every()

    def _mend(self) -> None:
        """Start the agents that have died, empty; the next snapshot fills them. Decided alike on all ranks."""
        gone = torch.zeros(self._layout.nodes, dtype=torch.int64)
        gone[self._node] = int(self._client.gone)
        if self._world.size > 1:
            dist.all_reduce(gone, op=dist.ReduceOp.MAX)
        if not gone[self._node]:
            return
        self._client.close()
        try:
            ensure_agent(self._config)
            self._attach()
            self._lost = None
        except FtError as error:
            self._lost = str(error)

    def _every(self) -> int:
        """Steps to the next snapshot: as the spec says, or agreed from what all ranks measured."""
        if isinstance(self._spec.every, int):
            return self._spec.every
        commits = [commit.seconds for commit in self._client.commits]
        self._interval = self._interval.measured(
            copy=self._snapshotter.timings.blocked, commit=commits[-1] if commits else None
        )
        return self._world.largest(self._interval.steps)

    def news(self) -> str | None:
        """Why the last snapshot was not taken, once for each new reason; training goes on without it."""
        failure = self._snapshotter.failure
        text = self._lost or (None if failure is None else str(failure))
        fresh = text if text != self._reported else None
        self._reported = text
        return fresh

    def timings(self) -> dict[str, float]:
        """Seconds and bytes of this rank, for the event log."""
        timings = self._snapshotter.timings
        return {
            "taken": timings.taken,
            "skipped": timings.skipped,
            "blocked_s": timings.total_blocked,
            "last_copy_s": timings.copy,
            "bytes": timings.bytes,
        }

    def abandon(self) -> None:
        """Take leave of the agent at once: a running copy is given up, and nobody is waited for."""
        self._snapshotter.abandon()
        self._client.close()

    def close(self, *, finished: bool) -> None:
        """Take leave of the agent; it ends when a finished job's workers all have."""
        self.before_update()
        self._client.close(end_of_job=finished)

    def _state_bytes(self, part: int) -> int:
        """Bytes of the largest node state: the sum over a node's ranks, the largest over the nodes."""
        parts = torch.zeros(self._world.size, dtype=torch.int64)
        parts[self._world.rank] = part
        if self._world.size > 1:
            dist.all_reduce(parts)
        return int(parts.view(self._layout.nodes, self._layout.ranks_per_node).sum(dim=1).max())

    def _together(self, action: Callable[[], object]) -> None:
        """Run an action that may fail on some ranks, and let all ranks know."""
        failure: Exception | None = None
        try:
            action()
        except Exception as error:
            failure = error
        if self._world.any(failure is not None):
            raise failure or AgentError(f"rank {self._world.rank}: the agent of another node could not be started")


def _write_template(folder: Path, config: AgentConfig) -> None:
    atomic_write(folder / AGENTS_FOLDER / TEMPLATE_FILE, msgspec.json.encode(config), mode=READABLE)


def _agent_config(
    spec: SnapshotSpec, folder: Path, *, run: str, slot: int, groups: tuple[Group, ...], state_bytes: int
) -> AgentConfig:
    durable = spec.durable
    return AgentConfig(
        run=run,
        slot=slot,
        host=os.environ.get("KEEPWARM_HOST", "127.0.0.1"),
        folder=str(runtime_folder(run, slot)),
        shared=str(folder),
        secret=str(folder / SECRET),
        groups=tuple(GroupConfig(members=group.members, parity=group.m) for group in groups),
        state_bytes=state_bytes,
        bucket_bytes=spec.bucket,
        rate=spec.bandwidth,
        silence=spec.silence,
        lease=spec.lease,
        inventory_deadline=spec.inventory_deadline,
        scrub=spec.scrub,
        threads=spec.threads,
        kernel=AUTO if spec.code is None else spec.code.kernel,
        port=spec.port,
        durable=None
        if durable is None
        else DurableConfig(
            root=str(RunFolder(folder).checkpoints),
            every=durable.every,
            keep=durable.keep,
            keep_every=durable.keep_every,
            compress=durable.compress,
            deadline=durable.deadline,
        ),
    )
