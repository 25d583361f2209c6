"""One node's part in a run: takes a slot or waits, guards the slot's agent, runs the workers by rounds."""

import contextlib
import json
import os
import signal
import sys
import time
from types import FrameType
from typing import Literal

import msgspec
from torch.distributed.elastic.rendezvous import RendezvousClosedError

from keepwarm.exit_code import ExitCode
from keepwarm.ft.discovery.config import NODE
from keepwarm.ft.errors import FtError
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.forkserver import Nursery, StoreOrder
from keepwarm.launch.node import record
from keepwarm.launch.node.elastic_agent import NodeAgent, Plan
from keepwarm.launch.node.flush_before_shrink import rescue
from keepwarm.launch.node.membership import Membership, RunEnded, StoreLost
from keepwarm.launch.node.options import Options
from keepwarm.launch.node.record import NodeRecord, State
from keepwarm.launch.node.rendezvous import Fenced, LeftOut, NoSpareLeft, SlotRendezvous, make
from keepwarm.launch.node.slot_table import Kind, Table
from keepwarm.launch.node.snapshot_agent import SnapshotAgent
from keepwarm.trainer.distributed.in_process_restart import EPOCH, RECOVERY, may_stay
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.shrink import layouts
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.monitor import events

SILENCE = 5.0
"""Seconds without a sign of life after which a node is dead, unless `snapshot.peer_timeout` says otherwise."""
AGENT_POLL_INTERVAL_S = 0.25
"""Seconds between two looks at the agent."""
GROW_AFTER = 5.0
"""Seconds that workers run before they are asked to make room for more."""


class Supervisor(Plan):
    """One node's part in a run."""

    def __init__(self, options: Options, job: JobSpec, nursery: Nursery) -> None:
        self._options, self._job, self._nursery = options, job, nursery
        folder = options.folder
        logs = RunFolder(folder).logs
        logs.mkdir(parents=True, exist_ok=True)
        arguments = (str(RunFolder(folder).run_file), *(["--resume"] if options.resume else []))
        super().__init__(options.module, arguments, str(logs), options.ranks_per_node, stay=may_stay(job))
        self._snapshots = job.snapshot != "off"
        silence = SILENCE if job.snapshot == "off" else job.snapshot.peer_timeout
        self._silence = silence
        self._guard = SnapshotAgent(folder, options.host)
        cluster = job.cluster
        first = Table(
            slots=options.slots,
            max_restarts=cluster.max_restarts,
            max_node_failures=cluster.max_node_failures,
            sizes=tuple(layouts(job)) if cluster.elastic == "shrink" else (),
        )
        self._membership = Membership(folder, options.node, first, silence=silence, open_store=self._open_store)
        self._handler = make(
            self._membership, job.name, options.slots, wish=options.wish, patience=options.patience,
            shrink_after=cluster.shrink_after,
        )  # fmt: skip
        self._handler.resized, self._handler.rescue, self._handler.save = self._resized, self._rescue, self._guard.save
        self._handler.prepare, self._handler.waiting = self._prepare, self._waiting
        self._agent = NodeAgent(self._handler, nursery, self)
        self._handler.asked_to_leave = lambda: self._agent.asked
        self._record = NodeRecord(node=options.node, host=options.host, slot=None, supervisor=os.getpid())
        self._unwhole = False
        self._looked = self._started = 0.0

    def run(self) -> int:
        """Until the run has ended; returns its exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._signal)
        code, why = int(ExitCode.UNRECOVERABLE), "a defect"
        try:
            self._note(state="joining")
            self._membership.enter()
            self._event(events.SupervisorStarted(node=self._options.node, slots=self._options.slots))
            code, why = self._rounds()
        except (NoSpareLeft, StoreLost, FtError, LaunchError) as error:
            code, why = getattr(error, "exit_code", ExitCode.BAD_INPUT), str(error)
            if isinstance(error, LeftOut):
                self._event(events.NodeExcluded(host=self._options.node, why=why))
            if isinstance(error, NoSpareLeft | RunEnded):
                with contextlib.suppress(StoreLost):
                    self._handler.end(code, why)
        finally:
            self._leave(code, why)
        return code

    def _rounds(self) -> tuple[int, str]:
        """The elastic agent leaves when its store dies or its node is fenced; it is sent in again."""
        while True:
            try:
                self._agent.run()
                ended = self._handler.ended()
                if ended is not None:
                    self._membership.say_end(ended.code, ended.reason)
            except RendezvousClosedError as error:
                ended = self._handler.ended()
                if ended is None:
                    return ExitCode.INTERRUPTED, str(error)
            except Fenced as error:
                self._say(str(error))
                self._note(state="fenced", slot=None, workers={}, agent=None)
                self._guard.kill()
                self._handler.rejoin(fenced=True)
                continue
            except StoreLost as error:
                self._say(str(error))
                self._note(state="restarting", workers={})
                self._reenter()
                continue
            if ended is not None:
                return ended.code, ended.reason

    def _reenter(self) -> None:
        before = self._membership.record.number if self._membership.record is not None else None
        self._handler.rejoin(fenced=False)
        self._membership.enter()
        self._handler.reentered(before)

    def _leave(self, code: int, why: str) -> None:
        if code:
            self._guard.kill()
        else:
            self._guard.close()
        with contextlib.suppress(StoreLost):
            self._handler.give_up_slot(why)
        self._membership.leave(politely=True)
        self._event(events.SupervisorEnded(node=self._options.node, code=code, why=why))
        self._note(state="ended", workers={})
        if code and code != ExitCode.INTERRUPTED and self._record.slot in (0, None):
            self._say(why)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self._agent.signalled(number)

    # ---- what the handler and the elastic agent ask for

    def _prepare(self, slot: int) -> None:
        """Before workers start: the agent runs, so that it fills its memory while they do."""
        if self._snapshots:
            table = self._handler.membership.read()
            if table.resized:
                self._guard.discard()
            self._guard.take(slot)
            if table.begun and not table.resized:
                self._guard.ensure()
        self._note(slot=slot, agent=self._guard.pid)

    def _resized(self, table: Table) -> None:
        self._event(events.Resized(node=self._options.node, slots=table.slots, why=_why(table)))

    def _rescue(self) -> None:
        """Have what is in memory written to disk, before there are fewer slots."""
        job, handler = self._job, self._handler
        if job.snapshot == "off" or job.snapshot.durable is None:
            return
        vacant = handler.membership.read().vacant
        options = self._options
        substitutes = [SnapshotAgent(options.folder, options.host) for _ in vacant]
        for slot, substitute in zip(vacant, substitutes, strict=True):
            substitute.take(slot)
        found = rescue(
            self._guard, substitutes, RunFolder(options.folder).checkpoints, everyone=handler.save_all,
            needed=lambda: not self._agent.asked and handler.membership.read().vacant == vacant,
            deadline=job.snapshot.durable.deadline,
        )  # fmt: skip
        if isinstance(found, int):
            self._event(events.MemorySaved(node=options.node, step=found, slots=vacant))
        else:
            self._event(events.MemoryNotSaved(node=options.node, why=found, slots=vacant))

    def _waiting(self, state: str, slot: int | None) -> None:
        if slot is None and self._record.slot is not None:
            self._guard.kill()
        self._note(state=msgspec.convert(state, State), slot=slot, workers={})

    def environment(self, handler: SlotRendezvous) -> dict[str, str]:
        table, slot = handler.table, handler.slot
        assert table is not None
        assert slot is not None
        host = self._options.host
        found = {"KEEPWARM_HOST": host, "PYTHONUNBUFFERED": "1"}
        if host.startswith("127."):
            found |= {key: os.environ.get(key, "lo") for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        if slot == 0 and table.round > 0 and self._snapshots and (epoch := self._guard.begin_epoch()) is not None:
            found[EPOCH] = str(epoch)
        if slot == 0 and table.round > 0:
            found[RECOVERY] = json.dumps(recovery(table, time.time()))
        return found

    def started(self, workers: dict[int, int]) -> None:
        slot, table = self._handler.slot, self._handler.table
        assert table is not None
        self._started = time.monotonic()
        self._unwhole = self._snapshots and slot in table.moved
        self._note(state="running", workers=workers, generation=table.round, agent=self._guard.pid)

    def failed(self, kind: Kind, cause: str) -> None:
        self._failure(kind, cause)

    def look(self) -> None:
        """Now and then: the agent's pid, whether it still runs, whether its memory is whole again."""
        now = time.monotonic()
        if now - self._looked < AGENT_POLL_INTERVAL_S:
            return
        self._looked = now
        if now - self._started > GROW_AFTER and not self._agent.saving and self._handler.want_more():
            self._agent.save()
        if not self._snapshots:
            return
        if not self._guard.look():
            cause = f"the snapshot agent of slot {self._handler.slot} has died"
            self._failure("agent", cause)
            self._guard.restart()
            self._unwhole = True
        self._note(agent=self._guard.pid)
        if self._unwhole and (whole := self._guard.whole()) is not None:
            self._unwhole = False
            slots = (self._handler.slot,)
            self._event(events.Whole(node=self._options.node, slots=slots, epoch=whole[0], step=whole[1]))

    def _open_store(self, number: int) -> None:
        if number:
            cause = f"store {number - 1} cannot be reached"
            self._event(events.Failure(node=self._options.node, kind="store", cause=cause, slots=()))
        options = self._options
        self._nursery.open_store(
            StoreOrder(
                folder=str(options.folder), number=number, host=options.host, node=options.node, silence=self._silence
            )
        )

    def _note(self, **changes: object) -> None:
        after = msgspec.structs.replace(self._record, **changes)
        if after != self._record or after.state == "joining":
            self._record = after
            record.write(self._options.folder, after)

    def _failure(self, kind: Kind | Literal["agent"], cause: str) -> None:
        slots = (self._handler.slot,)
        self._event(events.Failure(node=self._options.node, kind=kind, cause=cause, slots=slots))

    def _event(self, event: events.Event) -> None:
        events.append(self._options.folder, event)

    def _say(self, text: str) -> None:
        print(f"keepwarm: {self._options.node}: {text}", file=sys.stderr, flush=True)


def recovery(table: Table, now: float) -> dict[str, object]:
    """What the supervisors know of a recovery when its workers are started; rank 0 adds what it restores."""
    failures = table.gravest
    slots = sorted(set(table.moved) | {failure.slot for failure in failures})
    unsaid = "the store was lost"
    if slots:
        unsaid += f", and with it the {'node' if len(slots) == 1 else 'nodes'} of {', '.join(map(str, slots))}"
    level: events.Level = "resized" if table.resized else "decoded" if table.moved else "local"
    noticed = min((failure.time for failure in failures), default=now)
    return {
        "level": level,
        "why": _why(table) if table.resized else "; ".join(dict.fromkeys(one.cause for one in failures)) or unsaid,
        "slots": slots,
        "started": now,
        "phases": {
            "detect": max((failure.silence for failure in failures), default=0.0),
            "rendezvous": max(0.0, now - noticed),
        },
    }


def _why(table: Table) -> str:
    """What made a run go on with another number of slots."""
    causes = "; ".join(dict.fromkeys(one.cause for one in table.failures))
    return f"{causes or 'nodes are back'}: {table.slots} of {max(table.sizes)} slots"


def supervise(options: Options, job: JobSpec) -> int:
    """Be a supervisor, in a process that has one thread and has imported what workers need."""
    os.environ[NODE] = options.node
    nursery = Nursery()
    try:
        return Supervisor(options, job, nursery).run()
    finally:
        nursery.close()
