"""In-memory snapshots of a training job for any trainer: the worker's half of `ft` in one class.

It starts the agent of each node, decides when a snapshot is due, takes it while training continues, and restores. A
trainer calls `maybe_snapshot` after a step, `join` before the next update, `restore` at startup and `close` at the end.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from keepwarm.files import READABLE, atomic_write, within
from keepwarm.ft.codec.kernel import AUTO
from keepwarm.ft.discovery.config import (
    SOCKET,
    AgentConfig,
    DurableConfig,
    FormerLayout,
    GroupConfig,
    LayoutAgents,
    runtime_folder,
)
from keepwarm.ft.discovery.registry import TEMPLATE_FILE, Registry
from keepwarm.ft.errors import AgentError, ForeignSnapshot, FtError, PlacementError
from keepwarm.ft.groups import groups_of
from keepwarm.ft.memory.shared_memory import SharedBuffer
from keepwarm.ft.protocol.messages import Address
from keepwarm.ft.spec import SnapshotSpec
from keepwarm.ft.transport.auth import SECRET, load_secret, run_identity
from keepwarm.ft.transport.identity import claim_secret, held_secret
from keepwarm.ft.transport.link import LinkLimits
from keepwarm.ft.transport.network import READER
from keepwarm.ft.worker import former_memory
from keepwarm.ft.worker.client import AgentClient, ensure_agent
from keepwarm.ft.worker.interval import Interval
from keepwarm.ft.worker.next_agent import NextAgent
from keepwarm.ft.worker.reader import RankPlace
from keepwarm.ft.worker.remote_agent import RemoteAgent
from keepwarm.ft.worker.snapshotter import GivenUp, Restoration, Shard, SnapshotOptions, Snapshotter, plan_part

ONLY_LAYOUT = LayoutAgents()
"""Of a run that has had one layout."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Nodes and ranks of a job. Rank r is on node r // ranks_per_node."""

    folder: Path
    """The run folder, on storage shared by all nodes."""
    layout: str
    """Equal for launches whose ranks hold the same shards. Memory of another layout is not restored rank by rank."""
    ranks_per_node: int
    host: str = "127.0.0.1"
    """Address of this node that the other nodes can reach."""
    agents: LayoutAgents = ONLY_LAYOUT
    """The agents of this layout, and those of the one before it, if they hold its state."""


COMMIT_POLL_INTERVAL_S = 0.02
FOLDER_PATIENCE_S = 2.0
"""How long ranks wait for a run folder from which they need nothing, in seconds."""
ADDRESS_BYTES = 192
"""Room for the address of an agent, whose host has at most 128 characters."""
LONGEST_PATIENCE = 1 << 20
"""Steps, far beyond any interval between snapshots."""


class InMemoryCheckpointer:
    """One rank's connection to its node's agent.

    Every rank must construct it and call `maybe_snapshot`, `restore`, `begin_epoch` and `close`: these are collective.
    """

    def __init__(
        self,
        spec: SnapshotSpec,
        state: Mapping[str, Shard],
        deployment: Deployment,
        *,
        capture: Callable[[], None] = lambda: None,
        optional: tuple[str, ...] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Start the agents that are not running and attach to this node's."""
        self._spec, self._state, self._deployment = spec, state, deployment
        self._capture, self._optional = capture, optional
        self._ranks = _Ranks(group)
        self._nodes, rest = divmod(self._ranks.size, deployment.ranks_per_node)
        if rest:
            raise PlacementError(f"{self._ranks.size} ranks do not fill nodes of {deployment.ranks_per_node} ranks")
        self._node, self._local = divmod(self._ranks.rank, deployment.ranks_per_node)
        self._groups = groups_of(self._nodes, spec)
        self._registry = Registry(deployment.folder, deployment.agents.generation)
        self._secret = self._shared_secret()
        self._config = self._agent_config()
        self._start_agents()
        self._attach()
        self._introduce()
        self._decoded = 0
        self.phases: dict[str, float] = {}
        """Seconds of the last `restore` on this rank: waiting for the agents' decision, for lost chunks, and copying.
        """
        self._interval = Interval(mtbf=spec.mtbf)
        self._next = 0
        self._beside = True  # the first step warms up
        self._agreed: Sequence[int] | None = (0, self._interval.steps)  # no agent has died, and nothing is measured
        self._taken = -1
        self._patience = 1
        """Steps to the next attempt while the memory is exposed; the last one may be about to be committed."""
        self._lost_agent: str | None = None

    # ---- construction

    def _shared_secret(self) -> bytes:
        """Return the run's secret: from memory if this process was forked by one that has it, else from its file."""
        held = held_secret(self._deployment.folder)
        if self._ranks.largest(int(held is None)) == 0 and held is not None:
            return held
        if self._ranks.rank == 0:
            claim_secret(self._deployment.folder)
        self._ranks.barrier()
        return load_secret(self._deployment.folder / SECRET)

    def _agent_config(self) -> AgentConfig:
        spec, deployment = self._spec, self._deployment
        run = run_identity(self._secret)
        return AgentConfig(
            run=run,
            slot=self._node,
            generation=deployment.agents.generation,
            host=deployment.host,
            folder=str(runtime_folder(run, self._node, deployment.agents.generation)),
            shared=str(deployment.folder),
            secret=str(deployment.folder / SECRET),
            groups=tuple(GroupConfig(members=group.members, parity=group.m) for group in self._groups),
            state_bytes=self._state_bytes(),
            bucket_bytes=spec.bucket,
            rate=spec.bandwidth,
            kernel=AUTO if spec.code is None else spec.code.kernel,
            silence=spec.peer_timeout,
            lease=spec.lease,
            inventory_deadline=spec.inventory_deadline,
            scrub=spec.scrub,
            threads=spec.threads,
            port=spec.port,
            authenticate=spec.authenticate,
            durable=_durable(spec, deployment.folder / "checkpoints"),
        )

    def _state_bytes(self) -> int:
        """Return the bytes of the largest node state: summed over a node's ranks, maximum over the nodes."""
        parts = torch.zeros(self._ranks.size, dtype=torch.int64)
        parts[self._ranks.rank] = plan_part(self._state, self._ranks.rank, self._spec.bucket).size
        self._ranks.all_reduce(parts, dist.ReduceOp.SUM)
        return int(parts.view(self._nodes, self._deployment.ranks_per_node).sum(dim=1).max())

    def _start_agents(self) -> None:
        """Start this node's agent from its first rank. Raise on all ranks if it fails on any of them."""
        failure: Exception | None = None
        if self._local == 0:
            try:
                ensure_agent(self._config, secret=self._secret)
            except Exception as error:
                failure = error
        if self._ranks.largest(int(failure is not None)):
            raise failure or AgentError(f"rank {self._ranks.rank}: the agent of another node could not be started")
        if self._ranks.rank == 0:
            template = self._registry.folder / TEMPLATE_FILE
            content = msgspec.json.encode(self._config)
            # A folder that is full or does not answer keeps the one of the last start.
            within(lambda: atomic_write(template, content, mode=READABLE), FOLDER_PATIENCE_S)

    def _attach(self, mapped: Sequence[SharedBuffer] = ()) -> None:
        """Attach this rank to its node's agent, with the buffers `mapped` of the one before.

        Return once all ranks of the node have attached.
        """
        config = self._config
        self._measured = 0  # of the snapshots that this snapshotter takes
        self._client = AgentClient(config.socket, run=config.run, secret=self._secret, worker=self._local)
        self._client.reuse(mapped)
        self._client.wait_until_grown(config.start_seconds)
        self._next_agent = NextAgent(config, self._secret, starts=self._local == 0)
        self._snapshotter = Snapshotter(
            self._client,
            self._state,
            self._place(),
            layout=self._deployment.layout,
            options=SnapshotOptions(
                busy=self._spec.when_busy, deadline=self._spec.commit_deadline, optional=self._optional
            ),
        )

    def _introduce(self) -> None:
        """Tell this node's agent where the others are, as their ranks know. Collective.

        It needs no file for it, and waits for none.
        """
        attached = None if self._client.gone else self._client.attached
        mine = b"" if attached is None else msgspec.msgpack.encode(attached.address)
        found = self._told(mine, ADDRESS_BYTES)
        if self._local == 0 and attached is not None:
            agents = {node: msgspec.msgpack.decode(row, type=Address) for node, row in enumerate(found) if row}
            with contextlib.suppress(AgentError):  # it has just died
                self._client.introduce(agents)

    def _told(self, mine: bytes, room: int) -> list[bytes]:
        """Return what the first rank of each node tells, nothing where it tells nothing. Collective.

        `room` is the most bytes that one may tell.
        """
        rows = torch.zeros(self._nodes, 2 + room, dtype=torch.uint8)
        if self._local == 0:
            row = bytearray(len(mine).to_bytes(2, "little") + mine).ljust(2 + room, b"\0")
            rows[self._node] = torch.frombuffer(row, dtype=torch.uint8)
        self._ranks.all_reduce(rows, dist.ReduceOp.SUM)
        told = [row.numpy().tobytes() for row in rows]
        return [row[2 : 2 + int.from_bytes(row[:2], "little")] for row in told]

    def _place(self) -> RankPlace:
        return RankPlace(
            rank=self._ranks.rank,
            world=self._ranks.size,
            workers=self._deployment.ranks_per_node,
            node=self._node,
            nodes=self._nodes,
            bucket_bytes=self._config.bucket_bytes,
        )

    @property
    def protected(self) -> bool:
        """Whether every group has parity; false on a single node, where no other node can hold any."""
        return all(group.protected for group in self._groups)

    # ---- taking snapshots

    def maybe_snapshot(self, step: int, meta: Callable[[], bytes], step_seconds: float) -> None:
        """Start a snapshot if one is due after `step` completed steps. It is copied while training continues.

        `meta` returns the small state that, besides the shards, is needed to continue training; it is called only if a
        snapshot is due. `step_seconds` is the duration of the step. A failing snapshot does not raise: see
        `last_error`.

        Raises:
            ValueError: `meta` is larger than the room planned for it, 1 MiB.
            FtError: the data restored at startup turns out to be damaged, as `join` finds.
        """
        self._interval = self._interval.stepped(step_seconds, beside=self._beside)
        self._beside = self._beside and not self._settled()
        if step < self._next:
            return
        gone, steps = self._agreed or self._ranks.largest_each(self.votes())
        self._agreed = None
        if gone:
            self._replace_dead_agents()
        self._take(step, meta, steps)

    def _take(self, step: int, meta: Callable[[], bytes], steps: int) -> None:
        self._measure()
        self._capture()
        if not self._client.gone:
            self._snapshotter.offer(step, meta())
            self._beside = True
        self._taken, self._next = step, step + (self._spec.every if isinstance(self._spec.every, int) else steps)

    def exposed(self, step: int) -> bool:
        """Return whether this rank should not wait for the next snapshot that is due. Neither collective nor waiting.

        So it is if this node's agent has died and the next one answers, or if the agents hold nothing that is whole, as
        after the loss of a keeper. Ask all ranks between two steps, and call `protect` on all if any says so. Attempts
        that fail are repeated after 1, 2, 4, ... steps.
        """
        if not (self._next_agent.ready() if self._client.gone else self._client.exposed):
            self._patience = 1
            return False
        return step >= self._taken + self._patience

    def protect(self, step: int, meta: Callable[[], bytes]) -> bool:
        """Attach to new agents and, if memory needs it, start a snapshot. Return whether it does. Collective."""
        self._replace_dead_agents()
        self._patience = min(2 * self._patience, LONGEST_PATIENCE)
        exposed, _, steps = self._ranks.largest_each((int(self._client.exposed), *self.votes()))
        if exposed:
            self._take(step, meta, steps)
        return exposed > 0

    def votes(self) -> tuple[int, int]:
        """Return what all ranks are to know the largest of: whether this rank's agent has died, and its interval.

        A trainer that has a collective in every step lets the votes travel with it and calls `agreed` with the result;
        otherwise `maybe_snapshot` has a collective of its own when a snapshot is due.
        """
        return int(self._client.gone), self._interval.steps

    def agreed(self, largest: Sequence[int]) -> None:
        """Take the largest of all ranks' `votes`, by place."""
        self._agreed = largest

    def _settled(self) -> bool:
        """Return whether the last snapshot costs training nothing any more: it was committed, or has failed."""
        sealed, commits = self._snapshotter.sealed, list(self._client.commits)[-1:]
        committed = sealed is not None and any(commit.snapshot.age >= sealed.age for commit in commits)
        return not self._snapshotter.running and (committed or self._snapshotter.failure is not None or sealed is None)

    def _measure(self) -> None:
        """Account for the last snapshot, now that the next one is due."""
        timings, commits = self._snapshotter.timings, self.commit_seconds
        if timings.taken > self._measured:
            self._measured = timings.taken
            self._interval = self._interval.taken(blocked=timings.blocked, commit=commits[-1] if commits else None)

    def commit_now(self, step: int, meta: Callable[[], bytes]) -> str | None:
        """Have the state after `step` completed steps committed on all nodes; return why it is not, alike on all ranks.

        Waits at most `commit_deadline`. Collective. Raise FtError as `join` does.
        """
        self.join()
        sealed = self._snapshotter.sealed
        if sealed is None or sealed.step != step:
            self._replace_dead_agents()
            self._capture()
            if not self._client.gone:
                self._snapshotter.offer(step, meta())
            self.join()
        error = self.last_error or self._uncommitted(step)
        if self._ranks.largest(int(error is not None)):
            return error or "another node could not commit it"
        return None

    def _uncommitted(self, step: int) -> str | None:
        """Wait until a step of this epoch is committed; return why it is not."""
        end = time.monotonic() + self._spec.commit_deadline
        committed = None
        while time.monotonic() < end and not self._client.gone:
            try:
                committed = self._client.status().committed
            except AgentError as error:
                return str(error)
            if committed is not None and committed >= (self.epoch, step):
                return None
            time.sleep(COMMIT_POLL_INTERVAL_S)
        return f"step {step} was not committed within {self._spec.commit_deadline:g} s, the newest is {committed}"

    def _replace_dead_agents(self) -> None:
        """Attach to the next agents of those that died, and start them if no keeper does. All ranks decide alike."""
        gone = torch.zeros(self._nodes, dtype=torch.int64)
        gone[self._node] = int(self._client.gone)
        self._ranks.all_reduce(gone, dist.ReduceOp.MAX)
        if gone[self._node]:
            self._replace_agent()
        if gone.any():
            self._introduce()

    def _replace_agent(self) -> None:
        self._snapshotter.join()  # the memory may still be the one that this rank was granted
        mapped = self._client.detach()  # an agent that died leaves its memory to the next one
        self._client.close()
        try:
            ensure_agent(self._config, secret=self._secret)
            self._attach(mapped)
            self._lost_agent = None
        except (FtError, OSError) as error:
            self._lost_agent = str(error)
            self._client.close()  # the next attempt begins from nothing
            for buffer in mapped:
                buffer.close()

    def join(self) -> None:
        """Wait for the running copy. Call this before changing the tensors.

        Raise FtError if the data restored at startup turns out to be damaged.
        """
        self._snapshotter.join()

    @property
    def last_error(self) -> str | None:
        """Why the last snapshot was not taken, or None if it was."""
        failure = self._snapshotter.failure
        return self._lost_agent or (None if failure is None else str(failure))

    @property
    def copy_error(self) -> str | None:
        """Why this rank could not copy its state, where that is not its agent's fault, or None."""
        failure = self._snapshotter.failure
        return None if failure is None or isinstance(failure, (AgentError, GivenUp)) else str(failure)

    @property
    def slow_copies(self) -> str | None:
        """Why this rank's snapshot memory is not page-locked for its GPU, or None if it is or need not be."""
        reason = self._snapshotter.unlocked
        return None if reason is None else str(reason)

    @property
    def commit_seconds(self) -> list[float]:
        """Seconds from grant to commit of this node's newest snapshots, oldest first."""
        return [commit.seconds for commit in self._client.commits]

    def timings(self) -> dict[str, float]:
        """Return counters and seconds of this rank: `taken`, `skipped`, `blocked_s`, `last_copy_s` and its `bytes`."""
        timings = self._snapshotter.timings
        return {
            "taken": timings.taken,
            "skipped": timings.skipped,
            "blocked_s": timings.total_blocked,
            "last_copy_s": timings.copy,
            "bytes": timings.bytes,
        }

    # ---- restoring snapshots

    @property
    def epoch(self) -> int:
        """Number of the current epoch, one higher at every start of the workers. Part of a snapshot's identity."""
        return self._client.epoch

    def restore(self, settled: int = 0) -> Restoration | str:
        """Begin the next epoch and restore the committed state into the live shards, or return why there is none.

        `settled` is the epoch that a supervisor has made the agents begin, 0 for none. Raise FtError if agents, peers
        or bytes were lost on the way, or if the agents restored different steps.
        """
        epoch = self._next_epoch(settled)
        began, waited = time.time(), time.perf_counter()
        answer = self._client.restore(epoch, deadline=self._spec.commit_deadline)
        waited = time.perf_counter() - waited
        # The agents first verify what they hold and then choose.
        verified = min(max(0.0, answer.decided_at - began), waited)
        self._decoded = answer.decoded * self._config.bucket_bytes
        fetched = time.perf_counter()
        try:
            restored: Restoration | str = self._snapshotter.restore(epoch)
        except ForeignSnapshot as error:
            # Memory that cannot serve yields to the disk, if all ranks find it so.
            restored = str(error)
        if isinstance(restored, str) and (former := self._deployment.agents.former) is not None:
            restored = self._restore_former(former)
        self._agree(restored)
        self.phases = {
            "fetch": time.perf_counter() - fetched, "decode": waited - verified, "verify": verified,
        }  # fmt: skip
        return restored

    def _restore_former(self, former: FormerLayout) -> Restoration | str:
        """Restore from the agents of the layout before this one. Collective. Raise FtError as `restore` does."""
        mine, memory = b"", None
        with contextlib.ExitStack() as stack:
            if former.slot is not None:
                path = runtime_folder(self._config.run, former.slot, former.generation) / SOCKET
                client = self._former_client(path, stack)
                memory, found = former_memory.attach(client, former, self._deployment.ranks_per_node)
                mine = former_memory.encoded(found)
            told = former_memory.decoded(self._told(mine, former_memory.FOUND_BYTES))
            if memory is None:
                found = former_memory.chosen(told, self._node)
                client = self._former_client(self._remote(found), stack)
                memory = former_memory.elsewhere(client, former, found)
            try:
                restored, self._decoded = former_memory.restore_former(
                    memory, self._place(), self._state, self._optional
                )
            except ForeignSnapshot as error:
                return str(error)
            return restored

    def _former_client(self, agent: Path | RemoteAgent, stack: contextlib.ExitStack) -> AgentClient:
        role, worker = ("worker", self._local) if isinstance(agent, Path) else (READER, self._ranks.rank)
        client = AgentClient(
            agent, run=self._config.run, secret=self._secret, worker=worker, role=role,
            deadline=self._spec.commit_deadline,
        )  # fmt: skip
        stack.callback(client.close)
        return client

    def _remote(self, found: former_memory.Found) -> RemoteAgent:
        limits = LinkLimits(silence=self._spec.peer_timeout, authenticate_payloads=self._spec.authenticate == "all")
        return RemoteAgent(
            host=found.address.host, port=found.address.port, bucket_bytes=found.bucket_bytes, limits=limits
        )

    def begin_epoch(self, settled: int = 0) -> None:
        """Begin the next epoch without restoring, so that snapshots can be taken. See `restore`."""
        self._client.restore(self._next_epoch(settled), deadline=self._spec.commit_deadline)

    def _next_epoch(self, settled: int) -> int:
        """Return the epoch that is to begin, beyond all that the folder shows or the agents know, or `settled`."""
        seen = within(self._registry.newest_epoch, FOLDER_PATIENCE_S) if self._ranks.rank == 0 else None
        newest = max(self._client.epoch, seen or 0)
        # Only one supervisor knows of an epoch that it has made the agents begin; its rank tells the others.
        settled, newest = self._ranks.largest_each((settled, newest))
        return settled or newest + 1

    def _agree(self, restored: Restoration | str) -> None:
        """Raise on all ranks if they restored different steps, as when agents settled different epochs."""
        mine = -1 if isinstance(restored, str) else restored.epoch << 40 | restored.step
        newest, oldest = self._ranks.largest(mine), -self._ranks.largest(-mine)
        if newest != oldest:
            what = restored if isinstance(restored, str) else f"step {restored.step} of epoch {restored.epoch}"
            raise AgentError(f"agents do not agree on what is restored, here: {what}")

    def decoded(self) -> int:
        """Return the bytes of chunks, data and parity on all nodes, that were decoded for what was restored."""
        return self._decoded

    # ---- leaving

    def abandon(self) -> None:
        """Leave the agent immediately: cancel a running copy and wait for no peer."""
        self._snapshotter.abandon()
        self._client.close()

    def close(self, *, finished: bool) -> None:
        """Leave the agent, which exits once all workers of a `finished` job have left. Raise FtError as `join` does."""
        self.join()
        self._client.close(end_of_job=finished)


class _Ranks:
    """Collectives over a process group, or this rank alone if there is none."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)

    def all_reduce(self, numbers: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self.size > 1:
            dist.all_reduce(numbers, op=operation, group=self._group)

    def largest(self, value: int) -> int:
        return self.largest_each([value])[0]

    def largest_each(self, values: Sequence[int]) -> list[int]:
        numbers = torch.tensor(values, dtype=torch.int64)
        self.all_reduce(numbers, dist.ReduceOp.MAX)
        agreed: list[int] = numbers.tolist()
        return agreed

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self._group)


def _durable(spec: SnapshotSpec, root: Path) -> DurableConfig | None:
    durable = spec.durable
    if durable is None:
        return None
    return DurableConfig(
        root=str(root),
        every=durable.every,
        keep=durable.keep,
        keep_every=durable.keep_every,
        compress=durable.compress,
        deadline=durable.deadline,
    )
