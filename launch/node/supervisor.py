"""Supervisor of one node: takes a slot or waits, keeps the slot's agent running, starts and restarts the workers."""

import contextlib
import json
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Literal

import msgspec
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from keepwarm import signals
from keepwarm.exit_code import ExitCode
from keepwarm.files import within
from keepwarm.ft.discovery.config import NODE
from keepwarm.ft.discovery.registry import newest_generation
from keepwarm.ft.errors import AuthenticationFailed, FtError
from keepwarm.ft.groups import code_for, groups_of
from keepwarm.ft.transport.descriptors import raise_limit
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.forkserver import ForkServer, Worker
from keepwarm.launch.node import record
from keepwarm.launch.node.connections import address_of, run_secret
from keepwarm.launch.node.elastic_agent import NodeAgent, WorkerOptions
from keepwarm.launch.node.key_store.proxy import NoLoopback
from keepwarm.launch.node.membership import FILES_TIMEOUT_S, SEARCH_TIMEOUT_S, Membership, RunEnded, StoreLost
from keepwarm.launch.node.node_agents import Gathered, NodeAgents, newest_step
from keepwarm.launch.node.options import Options
from keepwarm.launch.node.peers import PeerListener, template_of
from keepwarm.launch.node.record import NodeRecord, SideWrites, State
from keepwarm.launch.node.rendezvous import Drained, Excluded, Fenced, NameTaken, NoSpareLeft, SlotRendezvous
from keepwarm.launch.node.slot_table import (
    Kind,
    Table,
    lost_of_former,
    must_flush_former,
    size_after_growing,
    size_after_shrinking,
)
from keepwarm.launch.node.snapshot_agent import SnapshotAgent
from keepwarm.launch.node.view import Member, identity
from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.plan.room import Room
from keepwarm.launch.plan.text import ONE_PORT, route, route_to_larger
from keepwarm.launch.rank_processes import OutlivesKill
from keepwarm.launch.run.gpu_watch import GpuWatch
from keepwarm.side_writer import attempt
from keepwarm.trainer.distributed.in_process_restart import AGENTS, EPOCH, RECOVERY, supports_in_process_restart
from keepwarm.trainer.job.files import hold
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.shrink import layouts
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.monitor import events

PEER_TIMEOUT_S = 5.0
"""Silence after which a node is dead, unless `snapshot.peer_timeout` overrides it."""
AGENT_POLL_INTERVAL_S = 0.25
"""How often the snapshot agent is checked."""
HAND_OVER_INTERVAL_S = 1.0
"""How often workers are asked to hand over until they do."""
GROW_AFTER_S = 5.0
"""How long workers run before they are asked to make room for more."""
LEAVING_SEARCH_S = 20.0
"""How long an owner that was asked to end looks for a store: the others may need its memory meanwhile."""


class Stopped(LaunchError):
    """This node was asked to leave before it had a part in the run, or could go on with it."""

    exit_code = ExitCode.INTERRUPTED


class Supervisor:
    """Supervisor of one node; implements `Hooks` for its rendezvous and its elastic agent."""

    def __init__(self, options: Options, job: JobSpec, server: ForkServer) -> None:
        self._options, self._job, self._server = options, job, server
        folder = options.folder
        logs = RunFolder(folder).logs
        with attempt("logs"):
            logs.mkdir(parents=True, exist_ok=True)
        arguments = (str(folder / options.spec), *(["--resume"] if options.resume else []))
        workers = WorkerOptions(
            module=options.module,
            arguments=arguments,
            logs=str(logs),
            ranks_per_node=options.ranks_per_node,
            reusable=supports_in_process_restart(job),
        )
        self._snapshots = job.snapshot != "off"
        self._peer_timeout = PEER_TIMEOUT_S if job.snapshot == "off" else job.snapshot.peer_timeout
        cluster = job.cluster
        first = Table(
            slots=options.slots,
            generation=within(lambda: newest_generation(folder), FILES_TIMEOUT_S) or 0,
            max_restarts=cluster.max_restarts,
            max_node_failures=cluster.max_node_failures,
            max_excluded=max_excluded(job, options.slots),
            sizes=tuple(layouts(job)) if cluster.elastic == "shrink" else (),
            groups=_groups(job, options.slots) if options.domain else {},
        )
        self._side, self._gpus = SideWrites(), GpuWatch()
        node = identity(options.node, secrets.token_hex(4))
        self._peers = PeerListener(run_secret(folder), options.host, node)
        self._agents = NodeAgents(self._agent_of, node)
        self._me = Member(node=node, host=address_of(options.host), port=self._peers.port, domain=options.domain)
        self._membership = Membership(
            folder, self._me, first, peer_timeout=self._peer_timeout, peers=self._peers, open_store=self._open_store
        )
        self._handler = SlotRendezvous(
            self._membership, job.name, self, requested_slot=options.requested_slot,
            vacancy_timeout=options.vacancy_timeout, shrink_after=cluster.shrink_after,
        )  # fmt: skip
        self._agent = NodeAgent(self._handler, server, self, workers, self._peers.secret)
        self._terminated_at: float | None = None
        """When this node alone was asked to end, by SIGTERM."""
        self._record = NodeRecord(
            node=options.node, host=options.host, port=self._peers.port, slot=None, supervisor=os.getpid()
        )
        self._said = ""
        self._redundancy_lost = False
        self._polled_at = self._started_at = self._asked_at = self._growing_from = 0.0
        self._way = self._not_in_memory = ""
        """Which way the run grows and why, and why it could not grow through memory before."""

    def run(self) -> int:
        """Take part in the run until it has ended; return its exit code."""
        signals.handle((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), self._on_signal)
        code, why = int(ExitCode.UNRECOVERABLE), "internal error"
        cause: Exception | None = None
        try:
            self._record_state(state="joining")
            self._membership.enter(self._patience)
            self._event(events.SupervisorStarted(node=self._options.node, slots=self._options.slots))
            code, why = self._run_agent()
        except (FtError, LaunchError) as error:
            cause = error
            code, why = getattr(error, "exit_code", ExitCode.BAD_INPUT), str(error)
            if self._terminated_at is not None and isinstance(error, Drained | StoreLost):
                code = ExitCode.INTERRUPTED
            if isinstance(error, Excluded | OutlivesKill):
                self._event(events.NodeExcluded(host=self._options.node, why=why))
            if isinstance(error, Drained):
                slots = () if self._record.slot is None else (self._record.slot,)
                self._event(events.NodeDrained(host=self._options.node, slots=slots))
                self._print(why)
            if isinstance(error, NoSpareLeft | RunEnded):
                with contextlib.suppress(LaunchError):
                    self._handler.end(code, why)
        except Exception as error:
            traceback.print_exc()
            cause, why = error, f"internal error: {type(error).__name__}: {error}"
        finally:
            self._leave(code, why, cause)
        return code

    def _run_agent(self) -> tuple[int, str]:
        """Run the elastic agent until the run ends; return (exit code, reason). It stops when its store dies, too."""
        while True:
            try:
                self._agent.run()
                ended = self._handler.ended()
                if ended is not None:
                    self._membership.record_end(ended.code, ended.reason)
            except RendezvousClosedError as error:
                ended = self._handler.ended()
                if ended is None:
                    return ExitCode.INTERRUPTED, str(error)
            except Fenced as error:
                self._print(str(error))
                self._record_state(state="fenced", slot=None, workers={}, agent=None, keeper=None)
                self._agents.kill()
                self._handler.rejoin(fenced=True)
                continue
            except StoreLost as error:
                self._print(str(error))
                self._record_state(state="restarting", workers={})
                self._reconnect()
                continue
            if ended is not None:
                return ended.code, ended.reason

    def _patience(self) -> float:
        """Return how long this node may look for a store; raise `Stopped` if it was asked to leave."""
        if self._agent.asked or (self._terminated_at is not None and self._handler.slot is None):
            raise Stopped(f"{self._options.node} was asked to leave")
        return SEARCH_TIMEOUT_S if self._terminated_at is None else LEAVING_SEARCH_S

    def _reconnect(self) -> None:
        before = self._membership.record.number if self._membership.record is not None else None
        self._handler.rejoin(fenced=False)
        self._membership.enter(self._patience)
        self._handler.on_reconnected(before)

    def _leave(self, code: int, why: str, cause: Exception | None) -> None:
        self._agents.release()
        if isinstance(cause, Excluded | Drained | OutlivesKill):
            self._agents.kill()
        elif isinstance(cause, NameTaken) or code == ExitCode.DONE:
            self._agents.leave_former()
            self._agents.present.close()
        else:
            on_disk = within(lambda: newest_step(RunFolder(self._options.folder).checkpoints), FILES_TIMEOUT_S)
            self._agents.leave_former(on_disk=-1 if on_disk is None else on_disk)
            if (step := self._newer_than_disk(on_disk)) is not None:
                self._agents.present.close()
                self._print(
                    f"step {step} stays in memory while the snapshot agent lives (snapshot.lease): --resume uses it"
                )
            else:
                self._agents.present.kill()
        with contextlib.suppress(LaunchError):
            self._handler.give_up_slot(why, excluded=isinstance(cause, OutlivesKill))
        self._membership.leave(farewell=True)
        self._gpus.close()
        self._peers.close()
        self._agent.close()
        self._event(events.SupervisorEnded(node=self._options.node, code=code, why=why))
        self._record_state(state="ended", workers={})
        self._side.close()
        if code and code != ExitCode.INTERRUPTED and self._record.slot in (0, None):
            self._print(why)

    def _newer_than_disk(self, on_disk: int | None) -> int | None:
        """Return the step that memory holds if the newest checkpoint on disk is older, or cannot be read."""
        committed = self._agents.present.committed()
        if committed is None:
            return None
        return None if on_disk is not None and on_disk >= committed[1] else committed[1]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, no more: an exception from here would strike in the middle of a thread's start or a lock."""
        if number == signal.SIGTERM:
            self._terminated_at = self._terminated_at or time.monotonic()
        else:
            self._agent.on_signal(number)

    # ---- hooks

    def leave_requested(self) -> bool:
        return self._agent.asked or self._ends()

    def on_others_missing(self, why: str) -> None:
        if why != self._said:
            self._said = why
            self._print(why)

    def prepare(self, slot: int) -> None:
        """Start the slot's agent before the workers, so that it fills its memory while they start.

        Whether a GPU is broken is reported before the table attributes the last failure, and so decides it.
        """
        if why := self._gpus.problem():
            self._handler.fail("gpu", why)
            self.on_failed("gpu", why)
        self._gpus.start()
        if self._snapshots:
            table = self._handler.membership.read()
            self._agents.follow(table)
            if slot == 0 and must_flush_former(table):
                self._flush_former()
            self._agents.present.take(slot)
            if table.begun and not table.resized:
                self._agents.present.ensure()
        self._record_state(slot=slot, agent=self._agents.present.pid, keeper=self._agents.present.keeper)

    def _agent_of(self, generation: int) -> SnapshotAgent:
        folder, host, secret = self._options.folder, self._options.host, self._peers.secret
        return SnapshotAgent(folder, host, secret, self._template_of_others, generation)

    def _template_of_others(self) -> bytes:
        view = self._peers.voter.installed
        members = {} if view is None else {member.node: member for member in view.members.values()}
        return template_of(self._peers.secret, members, self._me.node)

    def on_resized(self, table: Table) -> None:
        self._not_in_memory = ""
        self._event(events.Resized(node=self._options.node, slots=table.slots, why=_why(table)))

    def save_snapshot(self, epoch: int, *, former: bool) -> None:
        self._agents.save(epoch, former=former)

    def secure_memory(self) -> Gathered | None:
        """Make sure of memory before the run shrinks: the next layout reads it from there, or from the disk."""
        if self._job.snapshot == "off":
            return None
        table = self._handler.membership.read()
        vacant = table.vacant

        def still_needed() -> bool:
            return not self._agent.asked and self._handler.membership.read().vacant == vacant

        gathered = self._gather(vacant, still_needed, former=False)
        if isinstance(gathered, tuple) and table.former is None:
            room = self._room_beside(table, size_after_shrinking(table), lost=len(vacant))
            way = ONE_PORT if room is None else route(room)
            self._print(f"the run shrinks {way}")
            if room is not None and room.enough:
                self._event(events.MemoryKept(node=self._options.node, step=gathered[1], slots=vacant, room=way))
                return gathered
            self._event(events.MemoryNotKept(node=self._options.node, why=way))
        if not self._to_disk(gathered, vacant, still_needed, former=False) and table.former is not None:
            lost = lost_of_former(table)  # this layout may have committed nothing yet
            self._to_disk(self._gather(lost, still_needed, former=True), lost, still_needed, former=True)
        self._agents.release()
        return None

    def may_grow_in_memory(self) -> bool:
        if not self._snapshots:
            return False
        table = self._handler.membership.read()
        room = self._room_beside(table, size_after_growing(table), lost=0)
        in_memory, self._way = route_to_larger(room, self._job, self._not_in_memory)
        if not in_memory:
            self._event(events.MemoryNotKept(node=self._options.node, why=self._way))
            self._print(f"the run grows {self._way}")
        return in_memory

    def secure_growth(self) -> Gathered | Literal["disk", "nowhere"]:
        in_memory = self._handler.grows_in_memory
        if not self._snapshots or self._is_on_disk(or_equal=not in_memory):
            return "disk"
        restart = self._handler.restart

        def still_needed() -> bool:
            return not self._agent.asked and self._handler.membership.read().restart == restart

        gathered = self._gather((), still_needed, former=False)
        if isinstance(gathered, tuple):
            self._print(f"the run grows {self._way}")
            self._event(events.MemoryKept(node=self._options.node, step=gathered[1], slots=(), room=self._way))
            return gathered
        if not still_needed():
            return "nowhere"
        self._not_in_memory = gathered
        self._event(events.MemoryNotKept(node=self._options.node, why=gathered))
        return "disk" if self._is_on_disk(or_equal=True) else "nowhere"

    def _is_on_disk(self, *, or_equal: bool) -> bool:
        """Return whether the disk has a later step than this node's agent has committed, `or_equal` the same one.

        Agents end when their workers have saved. If these were asked to commit, an agent that is gone has died.
        """
        if (committed := self._agents.present.committed()) is None:
            return self._growing_from < self._started_at
        on_disk = within(lambda: newest_step(RunFolder(self._options.folder).checkpoints), FILES_TIMEOUT_S)
        return on_disk is not None and on_disk >= committed[1] + (not or_equal)

    def _flush_former(self) -> None:
        """Have the state of the layout before written to disk: the present one cannot read it from memory."""
        read = self._handler.membership.read
        while must_flush_former(table := read()) and table.slot_of(self._me.node) == 0 and not self._agent.asked:
            lost = lost_of_former(table)

            def still_needed(lost: tuple[int, ...] = lost) -> bool:
                return not self._agent.asked and lost_of_former(read()) == lost

            self._to_disk(self._gather(lost, still_needed, former=True), lost, still_needed, former=True)
            if still_needed():
                self._handler.settle()

    def _gather(self, lost: tuple[int, ...], still_needed: Callable[[], bool], *, former: bool) -> Gathered | str:
        snapshot = self._job.snapshot
        assert snapshot != "off"
        deadline = snapshot.commit_deadline if snapshot.durable is None else snapshot.durable.deadline
        return self._agents.gather(lost, former=former, still_needed=still_needed, deadline=deadline)

    def _to_disk(
        self, gathered: Gathered | str, lost: tuple[int, ...], still_needed: Callable[[], bool], *, former: bool
    ) -> bool:
        """Have what was gathered written by all agents of its layout; return whether it is on disk."""
        snapshot, node = self._job.snapshot, self._options.node
        assert snapshot != "off"
        if isinstance(gathered, str):
            why = gathered
        elif snapshot.durable is None:
            why = "snapshot.durable is not set"
        else:
            self._handler.save_on_all_nodes(gathered[0], former=former)
            why = self._agents.write(
                gathered, RunFolder(self._options.folder).checkpoints, former=former, still_needed=still_needed,
                deadline=snapshot.durable.deadline,
            )  # fmt: skip
            if not why:
                self._event(events.MemorySaved(node=node, step=gathered[1], slots=lost))
        if why:
            self._event(events.MemoryNotSaved(node=node, why=why, slots=lost))
        return not why

    def _room_beside(self, table: Table, size: int | None, *, lost: int) -> Room | None:
        """Return the room for the agents of a layout of `size` slots beside those that run, of `lost` slots included.

        None if they cannot run at once.
        """
        jobs = layouts(self._job)
        if size is None or size not in jobs or table.slots not in jobs:
            return None
        room = Plan(jobs[table.slots]).room_beside(Plan(jobs[size]), lost=lost)
        if room is None:
            return None
        after = room.after * (size if self._options.host.startswith("127.") else 1)  # emulated: all on this machine
        return Room(before=room.before, after=after, total=room.total + room.before)  # they run already

    def on_waiting(self, state: str, slot: int | None) -> None:
        if self._snapshots:
            self._agents.follow(self._handler.membership.read())
        if slot is None and self._record.slot is not None:
            self._agents.present.kill()
        self._record_state(state=msgspec.convert(state, State), slot=slot, workers={})

    def environment(self) -> dict[str, str]:
        table, slot = self._handler.table, self._handler.slot
        assert table is not None
        host = self._options.host
        variables = {"KEEPWARM_HOST": host, "PYTHONUNBUFFERED": "1"}
        if host.startswith("127."):
            variables |= {key: os.environ.get(key, "lo") for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        if self._snapshots:
            self._agents.follow(table)
            variables[AGENTS] = self._agents.names(table)
        if slot == 0 and table.restart > 0:
            if self._snapshots and (epoch := self._agents.present.begin_epoch()) is not None:
                variables[EPOCH] = str(epoch)
            variables[RECOVERY] = json.dumps(recovery(table, time.time()))
        return variables

    def on_started(self, workers: Mapping[int, int]) -> None:
        slot, table = self._handler.slot, self._handler.table
        assert table is not None
        self._started_at = time.monotonic()
        self._redundancy_lost = self._snapshots and slot in table.moved
        self._record_state(
            state="running", workers=dict(workers), restart=table.restart, agent=self._agents.present.pid,
            keeper=self._agents.present.keeper,
        )  # fmt: skip

    def on_failed(self, kind: Kind | Literal["agent"], cause: str) -> None:
        slots = (self._handler.slot,)
        self._event(events.Failure(node=self._options.node, kind=kind, cause=cause, slots=slots))

    def poll(self) -> None:
        """Check now and then whether the run can grow, the agent runs, and its memory is complete again."""
        now = time.monotonic()
        if now - self._polled_at < AGENT_POLL_INTERVAL_S:
            return
        self._polled_at = now
        if not self._agent.asked and self._ends():
            self._agent.on_signal(signal.SIGTERM)
        if now - self._started_at > GROW_AFTER_S and self._handler.growth_requested():
            self._hand_over_to_larger(now)
        if now - self._asked_at > HAND_OVER_INTERVAL_S and self._handler.hand_over_requested():
            self._asked_at = now
            self._hand_over()
        if not self._snapshots:
            return
        if self._handler.holds_former and self._handler.slot == 0 and self._agents.present.committed() is not None:
            self._handler.settle()
        self._agents.follow(self._handler.membership.read(), wait=False)
        if cause := self._agents.present.poll():
            self.on_failed("agent", cause)
            if self._handler.membership.read().decides:  # else the slot may be another node's by now
                self._agents.present.restart()
            self._redundancy_lost = True
        self._peers.template = self._agents.present.template
        self._record_state(agent=self._agents.present.pid, keeper=self._agents.present.keeper)
        if self._redundancy_lost and (complete := self._agents.present.complete_snapshot()) is not None:
            self._redundancy_lost = False
            slots = (self._handler.slot,)
            self._event(events.Whole(node=self._options.node, slots=slots, epoch=complete[0], step=complete[1]))

    def _ends(self) -> bool:
        """Return whether this node is to end after SIGTERM, as it cannot leave alone."""
        if self._terminated_at is None:
            return False
        return self._handler.leave_if_possible(time.monotonic() - self._terminated_at)

    def _hand_over(self) -> None:
        table = self._handler.membership.read()
        if self._snapshots and table.slots > 1 and (table.spares or self._agent.saving):
            self._agent.hand_over()
        elif not self._agent.saving and time.monotonic() - self._started_at > GROW_AFTER_S:
            # No other node holds the state of the one that leaves, or another layout reads it.
            self._agent.save()

    def _hand_over_to_larger(self, now: float) -> None:
        """Ask the workers for their state, so that the run can grow: in memory, or on disk if that takes too long."""
        snapshot = self._job.snapshot
        if not self._handler.grows_in_memory:
            if not self._agent.on_disk:
                self._agent.save()
            return
        assert snapshot != "off"
        if not self._agent.saving:
            self._growing_from = now
        if now - self._growing_from > snapshot.commit_deadline:
            if self._handler.slot == 0:
                why = f"through the disk: ranks committed nothing within {snapshot.commit_deadline:g} s of being asked"
                self._event(events.MemoryNotKept(node=self._options.node, why=why))
                self._handler.grow_on_disk()
        elif now - self._asked_at > HAND_OVER_INTERVAL_S:
            self._asked_at = now
            self._agent.hand_over()

    # ---- records

    def _open_store(self, number: int) -> None:
        if number:
            cause = f"the store was lost; this node opens store {number}"
            self._event(events.Failure(node=self._options.node, kind="store", cause=cause, slots=()))
        options = self._options
        arguments = (
            str(options.folder),
            f"--number={number}",
            f"--host={options.host}",
            f"--peer-timeout={self._peer_timeout}",
            f"--opener={self._me.host}:{self._me.port}",
        )
        # Its output is this process's: no file is needed to open a store.
        self._server.start(
            Worker(module="keepwarm.launch.node.store", arguments=arguments, environment={}, detached=True)
        )

    def _record_state(self, **changes: object) -> None:
        after = msgspec.structs.replace(self._record, **changes)
        if after != self._record or after.state == "joining":
            self._record = after
            self._side.put(lambda: record.write(self._options.folder, after))

    def _event(self, event: events.Event) -> None:
        self._side.put(lambda: events.append(self._options.folder, event))

    def _print(self, text: str) -> None:
        print(f"keepwarm: {self._options.node}: {text}", file=sys.stderr, flush=True)


def _layouts(job: JobSpec, slots: int) -> dict[int, JobSpec]:
    """Return the job in every layout that it may have, by the number of slots."""
    return layouts(job) if job.cluster.elastic == "shrink" else {slots: job}


def _groups(job: JobSpec, slots: int) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Return the slots of each group of nodes that protect each other, in any layout that the job may shrink to."""
    return {
        size: tuple(group.members for group in groups_of(size, one.snapshot))
        for size, one in _layouts(job, slots).items()
        if one.snapshot != "off"
    }


def max_excluded(job: JobSpec, slots: int) -> int:
    """Return how many nodes may be excluded at once without losing memory, in any layout that the job may shrink to."""
    jobs = _layouts(job, slots).items()
    parity = [code_for(nodes, one.snapshot.code)[1] for nodes, one in jobs if one.snapshot != "off"]
    return min(parity, default=1)


def recovery(table: Table, now: float) -> dict[str, object]:
    """Return what supervisors know of a recovery when its workers start; rank 0 adds what it restores."""
    failures = table.root_causes
    slots = sorted(set(table.moved) | {failure.slot for failure in failures})
    unrecorded = "the store was lost"
    if slots:
        unrecorded += f", and with it the {'node' if len(slots) == 1 else 'nodes'} of {', '.join(map(str, slots))}"
    level: events.Level = "resized" if table.resized else "decoded" if table.moved else "local"
    detected = min((failure.time for failure in failures), default=now)
    return {
        "level": level,
        "why": _why(table) if table.resized else "; ".join(dict.fromkeys(one.cause for one in failures)) or unrecorded,
        "slots": slots,
        "started": now,
        "phases": {
            "detect": max((failure.silence for failure in failures), default=0.0),
            "rendezvous": max(0.0, now - detected),
        },
    }


def _why(table: Table) -> str:
    """Return why a run goes on with another number of slots."""
    causes = "; ".join(dict.fromkeys(one.cause for one in table.failures))
    return f"{causes or 'nodes are back'}: {table.slots} of {max(table.sizes)} slots"


def supervise(options: Options, job: JobSpec) -> int:
    """Supervise a node, in a process that has one thread and has imported what workers need."""
    os.environ[NODE] = options.node
    raise_limit()
    try:
        # Before the fork server, whose children know the secret and the job from then on.
        run_secret(options.folder)
    except (AuthenticationFailed, OSError) as error:
        print(f"keepwarm: {options.node}: {error}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    hold(options.folder / options.spec, job)
    with contextlib.closing(ForkServer()) as server:
        try:
            supervisor = Supervisor(options, job, server)
        except NoLoopback as error:
            print(f"keepwarm: {error}", file=sys.stderr, flush=True)
            return error.exit_code
        return supervisor.run()
