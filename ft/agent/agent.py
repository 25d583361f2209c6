"""Snapshot agent of one node: `python -P -m keepwarm.ft.agent DESCRIPTORS CONFIG.json`, run by its keeper.

The shell around `keepwarm.ft.protocol.step`: it owns the sockets, memory, threads and clock, feeds events to the pure
protocol one at a time and carries out the resulting effects. It makes no decisions about snapshots.
"""

import collections
import dataclasses
import functools
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from keepwarm import signals
from keepwarm.files import within
from keepwarm.ft.agent import status as agent_status
from keepwarm.ft.agent import worker_sessions
from keepwarm.ft.agent.durable_writer import DurableWriter
from keepwarm.ft.agent.effects import Effects, Parts
from keepwarm.ft.agent.encoder import Encoder
from keepwarm.ft.agent.inbox import Inbox
from keepwarm.ft.agent.log import Journal
from keepwarm.ft.agent.outbox import Outbox
from keepwarm.ft.agent.peers import PeerLinks
from keepwarm.ft.agent.recovery_election import RecoveryElection
from keepwarm.ft.agent.remote_reads import Reads
from keepwarm.ft.agent.repair import Repair
from keepwarm.ft.agent.restores import RestoreAnswers
from keepwarm.ft.agent.scrubber import Scrub
from keepwarm.ft.agent.shell import Arrived
from keepwarm.ft.agent.worker_sessions import Session, WorkerSessions
from keepwarm.ft.agent.workpool import WorkPool
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.discovery import config as agent_config
from keepwarm.ft.discovery.config import AgentConfig
from keepwarm.ft.discovery.registry import Registry
from keepwarm.ft.discovery.runtime_folder import sweep
from keepwarm.ft.discovery.shared_folder import SharedFolder
from keepwarm.ft.errors import AgentError, FtError, MemoryTooSmall
from keepwarm.ft.keeper import DATA_FILES, DEFECT, FILES, PARITY_FILES, AgentExit
from keepwarm.ft.memory.buffers import Memory, Shape
from keepwarm.ft.memory.cpus import unbind
from keepwarm.ft.memory.records import Records
from keepwarm.ft.memory.shared_memory import Holder
from keepwarm.ft.protocol import events, kept_memory
from keepwarm.ft.protocol.ballot import Promises
from keepwarm.ft.protocol.messages import (
    Address,
    Attached,
    Cancel,
    Chosen,
    ChunkLost,
    Decision,
    Decode,
    Exposed,
    Fetch,
    Hello,
    Introduced,
    Inventory,
    InventoryRequest,
    Open,
    Proposal,
    Read,
    Restore,
    Save,
    Seal,
    StatusRequest,
    Vote,
    Wire,
)
from keepwarm.ft.protocol.state import Geometry, State, initial
from keepwarm.ft.protocol.step import step
from keepwarm.ft.transport import descriptors
from keepwarm.ft.transport.auth import load_secret, nonce
from keepwarm.ft.transport.link import Credentials, Link
from keepwarm.ft.transport.network import Network, NetworkLimits
from keepwarm.side_writer import protect_streams

TICK = 0.05
SLOT_POLL_INTERVAL_S = 0.25
"""Interval at which an agent without workers checks that it still owns its slot, in seconds."""
SLOT_PUBLISH_INTERVAL_S = 1.0
"""Interval between attempts to write this agent's address to a shared folder that does not take it, in seconds."""
SLOT_VERIFY_INTERVAL_S = 5.0
"""Interval at which an agent with workers checks that its address is in the shared folder, in seconds."""
FOLDER_PATIENCE_S = 2.0
"""How long an agent with an empty memory waits for the shared folder at its start, in seconds."""
FAREWELL = 60.0
"""Grace period in which an agent that was asked to stop lets its workers save and exit, in seconds."""


class Agent:
    """Agent of one slot. Implements `keepwarm.ft.agent.shell.Shell` for its parts and handles its workers' sessions.

    Each process is one incarnation of the slot's memory, whatever the last one left in it.
    """

    def __init__(
        self, config: AgentConfig, files: Mapping[str, int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Map the keeper's memory files, take up what is recorded of them and open the sockets.

        `files` are descriptors by name (`keepwarm.ft.keeper.FILES`). The agent takes those of the memory.
        """
        self.config, self.clock = config, clock
        strangers = descriptors.strangers(config.topology.slots, descriptors.raise_limit())
        self.folder = agent_config.private_folder(Path(config.folder))
        self.registry = Registry(Path(config.shared), config.generation)
        self.journal = Journal(self.registry.folder / f"agent-{config.slot}.log", slot=config.slot)
        for left in sweep(self.folder.parent, self.folder):
            self.journal.write("info", "removed what a killed agent left", folder=left)
        secret = _kept_secret(files["secret"], Path(config.secret))
        former = self._take_up(Records(files["records"], msgspec.json.encode(config)))
        group = self.state.group
        self.codec = Codec(group.data, group.parity, kernel=config.kernel)
        shape = Shape.of(config.state_bytes, config.bucket_bytes, group)
        data = [files[name] for name in DATA_FILES]
        parity = [files[name] for name in PARITY_FILES]
        for unused in (*data[self.state.data_buffers :], *parity[self.state.parity_buffers :]):
            os.close(unused)
        self.memory = Memory(shape, config.slot, data[: self.state.data_buffers], parity[: self.state.parity_buffers])
        self.selector = selectors.DefaultSelector()
        self.pool = WorkPool(self.selector, config.threads)
        # An agent that goes on with the memory of another one knows all that it needs, and waits for no file.
        newest = self.state.epoch or within(self.registry.newest_epoch, FOLDER_PATIENCE_S)
        self.shared = SharedFolder(self.registry, config.slot, self.pool.follow, clock, newest=newest)
        self.outbox = Outbox()
        self._events: collections.deque[tuple[events.Event, Arrived | None]] = collections.deque()
        self._dispatching = False
        self._exposed = self.state.exposed
        """What workers were told last, or when they attached."""
        self.inbox = Inbox(self)
        self.repair = Repair(self)
        self.reads = Reads(self)
        self.election = RecoveryElection(self, self._records.promises)
        self.scrub = Scrub(self)
        self.durable = DurableWriter(self, config.durable) if config.durable is not None else None
        self.peers = PeerLinks(self, self.inbox, self.repair, self.reads, self.election)
        self.network, self.sessions = self._open_sockets(secret, strangers, former)
        self.shared.moved = self.network.found
        self.restores = RestoreAnswers(self, self.sessions, self.election)
        self.commits = agent_status.CommitTimes()
        parts = Parts(
            sessions=self.sessions, encoder=Encoder(self), repair=self.repair, reads=self.reads,
            restores=self.restores, election=self.election, durable=self.durable, commits=self.commits,
        )  # fmt: skip
        self._effects = Effects(self, parts)
        self._next_publish = 0.0
        self._publish(self.clock())
        self.connect_peers(everyone=False)
        self._ended = ""
        self._late_since: float | None = None
        """When only a checkpoint being written began to keep this agent from ending."""
        self._leaves: tuple[str, float] | None = None
        """The signal that asked this agent to stop, and when it arrived."""
        processes = {"pid": os.getpid(), "keeper": os.getppid()}
        self.journal.write("info", "started", **processes, bytes=self.memory.bytes, address=self.network.address)

    def _take_up(self, records: Records) -> dict[int, Holder]:
        """Take up what the last agent recorded of the memory. Return its workers that still run, by worker number."""
        self._records, record, config = records, records.read(), self.config
        hint = time.time_ns()
        incarnation = hint
        if record is None:  # the first agent with this memory
            next_one = functools.partial(self.registry.next_incarnation, config.slot, hint)
            incarnation = within(next_one, FOLDER_PATIENCE_S) or hint
        durable = config.durable is not None
        self.state: State = initial(config.run, config.slot, incarnation, config.topology, durable=durable)
        if record is None:
            if records.damaged:
                self.journal.write("warning", "the records of the memory cannot be used: it counts as empty")
            return {}
        found = {each.worker: Holder.found(each.pid, each.started) for each in record.workers}
        former = {worker: holder for worker, holder in found.items() if holder is not None}
        self.state = kept_memory.resumed(self.state, record.memory, list(former))
        held = {str(copy.snapshot): copy.phase.value for copy in self.state.copies}
        self.journal.write("warning", "an agent of this slot has died: its memory is used on", held=held)
        return former

    def _open_sockets(
        self, secret: bytes, strangers: int, former: Mapping[int, Holder]
    ) -> tuple[Network, WorkerSessions]:
        config, incarnation = self.config, self.state.incarnation
        hello = Hello(role="agent", run=config.run, slot=config.slot, epoch=0, incarnation=incarnation, nonce=nonce())
        to_peers = Credentials(hello=hello, secret=secret, roles=Network.ROLES)
        network = Network(
            self.selector, self.peers, to_peers, bind=(config.host, config.port), resolve=self.shared.resolve,
            limits=NetworkLimits(
                payload=config.bucket_bytes, rate=config.rate, silence=config.silence, strangers=strangers,
                authenticate_payloads=config.authenticate == "all",
            ),
        )  # fmt: skip
        to_workers = dataclasses.replace(to_peers, roles=worker_sessions.ROLES)
        return network, WorkerSessions(self.selector, config.socket, to_workers, self.memory, self, former)

    # ---- life cycle

    def run(self) -> str:
        """Serve until the job ends, the lease expires or SIGTERM arrives. Return the reason.

        Batch systems signal every process of a job, but the signal is meant for the workers, which are about to save.
        An agent that receives it therefore exits only after its workers have left and their data is on disk.
        """
        signal.signal(signal.SIGTERM, self._asked)
        signals.handle((signal.SIGINT,), self._asked)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        next_tick = 0.0
        while not self._ended:
            for key, mask in self.selector.select(TICK):
                if not self._ended:
                    key.data.ready(mask)
            now = self.clock()
            if now >= next_tick:
                next_tick = now + TICK
                self._tick(now)
        return self._ended

    def end(self, reason: str) -> None:
        self._ended = reason

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._leaves = self._leaves or (signal.Signals(number).name, self.clock())

    def close(self) -> None:
        """Release everything but what the keeper has: sockets, endpoint and mappings."""
        self.journal.write("info", "ended", reason=self._ended)
        if self.durable is not None:
            self.durable.close()
        self.sessions.close()
        self.network.close()
        self.shared.close(self.state.incarnation)
        self.pool.close()
        self.selector.close()
        self.memory.close()
        self._records.close()
        self.journal.close()

    def _tick(self, now: float) -> None:
        self.network.tick(now)
        self.sessions.tick(now)
        self.peers.tick(now)
        self.repair.tick(now)
        self.election.tick(now)
        self.scrub.tick(now)
        if now >= self._next_publish:
            self._publish(now)
        if self.durable is not None:
            self.durable.tick()
        if failure := self.memory.growth.failure:
            self.end(f"the memory cannot be taken: {failure}")
        elif reason := self._done(now):
            self._end_unless_writing(reason, now)
        else:
            self._late_since = None
            if not self.sessions.workers and self.shared.displaced:
                # This agent's supervisor has died. Peers still connected here would not reach the newer agent.
                self.end("the slot has another agent, on another node")

    def _done(self, now: float) -> str:
        """Return why this agent is no longer needed, or nothing."""
        workers = self.sessions.workers
        if self.sessions.ended and not workers:
            return "end of the job"
        if self._leaves and (not workers or now - self._leaves[1] > FAREWELL):
            return self._leaves[0]
        unneeded = now - self.sessions.last_seen > self.config.lease
        return f"no process has needed this agent for {self.config.lease:g} s" if unneeded else ""

    def _end_unless_writing(self, reason: str, now: float) -> None:
        """End once the checkpoint under way is written, or storage has hung for longer than one may take."""
        if self.durable is None or not self.durable.busy:
            self.end(reason)
            return
        self._late_since = now if self._late_since is None else self._late_since
        late = now - self._late_since
        if not self.network.links or late > FAREWELL:
            self.durable.abandon()
        if late > FAREWELL + self.durable.deadline:
            self.journal.write("warning", "a checkpoint is given up: its storage does not answer")
            self.end(reason)

    def _publish(self, now: float) -> None:
        """Have this agent's endpoint in the shared folder, and see whether the slot has a newer agent."""
        self.shared.publish(self.network.address, self.state.incarnation)
        with_workers = SLOT_VERIFY_INTERVAL_S if self.shared.published else SLOT_PUBLISH_INTERVAL_S
        if self.config.slot == 0 and self.sessions.workers:  # a layout that has workers is the present one
            self.shared.keep(msgspec.json.encode(self.config), self.election.choice)
        self._next_publish = now + (with_workers if self.sessions.workers else SLOT_POLL_INTERVAL_S)

    def connect_peers(self, *, everyone: bool) -> None:
        self.peers.connect(everyone=everyone)

    # ---- the protocol

    def dispatch(self, event: events.Event, arrived: Arrived | None = None) -> None:
        """Handle events one at a time, with all effects of each before the next. `arrived` belongs to `event`.

        What an event changes in the memory is recorded before its effects: nothing is promised or granted that the next
        agent would not know of.
        """
        self._events.append((event, arrived))
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._events:
                event, arrived = self._events.popleft()
                before = self.state
                self.state, effects = step(before, event)
                self._records.write(self.state, self.sessions.pids)
                for effect in effects:
                    self._effects.carry_out(effect, arrived)
                if self.state is not before:
                    self._say_whether_exposed()
        finally:
            self._dispatching = False

    def _say_whether_exposed(self) -> None:
        exposed = self.state.exposed
        if exposed != self._exposed:
            self._exposed = exposed
            self.sessions.send_all(Exposed(exposed=exposed))

    def promise(self, promises: Promises) -> None:
        self._records.promises = promises
        self._records.write(self.state, self.sessions.pids)

    def route(self, sender: int, incarnation: int, message: Any) -> None:
        """Handle a message from an agent, which may be this one."""
        election = self.election
        if isinstance(message, (Decode, Fetch, Read)) and election.catch_up(message.epoch, sender):
            election.put_off(sender, incarnation, message)
            return
        match message:
            case Inventory():
                election.inventory(message)
            case InventoryRequest():
                election.asked(sender, message)
            case Proposal():
                election.asked_for_vote(sender, message)
            case Vote():
                election.voted(sender, message)
            case Chosen():
                election.told(message)
            case Read():
                self.reads.for_peer(sender, message)
            case _:
                self._protocol_message(sender, incarnation, message)

    def _protocol_message(self, sender: int, incarnation: int, message: Any) -> None:
        if isinstance(message, Decision):
            self.shared.learn(message.epoch, message.reason)
        self.dispatch(events.Received(sender, incarnation, message))
        if isinstance(message, Decision):
            self.election.heard(sender, message)
        elif isinstance(message, ChunkLost):
            self.repair.source_lost(sender, message)

    # ---- SessionHandler: processes on this node

    def configured(self, geometry: Geometry) -> Attached:
        self.dispatch(events.Configured(geometry))
        self.shared.look_newest()
        shape = self.memory.shape
        return Attached(
            epoch=max(self.state.epoch, self.shared.newest_epoch),
            buffers=len(self.memory.data),
            buffer_bytes=shape.data_bytes,
            bucket_bytes=shape.bucket_bytes,
            first=0,
            address=Address(*self.network.address, self.state.incarnation),
            exposed=self.state.exposed,
        )

    def worker_lost(self, worker: int) -> None:
        self.dispatch(events.WorkerLost(worker))

    def session_drained(self, link: Link) -> None:
        self.outbox.drained(link)

    def session_lost(self, link: Link) -> None:
        self.outbox.forget(link)
        self.inbox.forget(link)

    def worker_message(self, session: Session, message: Wire) -> None:
        if isinstance(message, StatusRequest):
            status = agent_status.status(self, self.sessions, self.commits, self.scrub, self.durable)
            session.link.send(status)
        elif isinstance(message, Restore) and session.role == "supervisor":
            self.election.begin(message.epoch)
        elif isinstance(message, Save) and session.role == "supervisor":
            if self.durable is not None:
                self.durable.save(message.epoch)
        elif session.attach is None or not session.attached:
            session.link.close(f"{type(message).__name__} before it was attached")
        elif isinstance(message, Restore):
            session.waits_for_epoch = message.epoch
            if message.epoch >= self.state.epoch:
                self.election.begin(message.epoch)
            self.restores.answer()
        elif isinstance(message, Read):
            self.reads.for_worker(session.link, message)
        elif isinstance(message, Introduced):
            self.shared.introduced(message.agents)
        elif (event := _event(session.attach.worker, message)) is not None:
            self.dispatch(event)
        else:
            session.link.close(f"{type(message).__name__} is not for agents")


def _kept_secret(descriptor: int, path: Path) -> bytes:
    """Return the job's secret from a memory file of the keeper, where the first agent puts it, so that the next ones
    need no other file. Take the descriptor.
    """
    secret = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    if not secret:
        secret = load_secret(path)
        os.pwrite(descriptor, secret, 0)
    os.close(descriptor)
    return secret


def _event(worker: int, message: Wire) -> events.Event | None:
    """Convert a worker's message to a protocol event. Return None for any other message."""
    match message:
        case Open(snapshot=snapshot, wait=wait):
            return events.WorkerOpened(worker, snapshot, wait)
        case Seal(snapshot=snapshot, sums=sums):
            return events.WorkerSealed(worker, snapshot, sums)
        case Cancel(snapshot=snapshot):
            return events.WorkerCancelled(worker, snapshot)
    return None


def main(arguments: list[str]) -> int:
    protect_streams()
    unbind()
    if len(arguments) != 2:
        print("usage: python -P -m keepwarm.ft.keeper CONFIG.json, which runs the agent", file=sys.stderr)
        return AgentExit.BAD_CONFIG
    files = dict(zip(FILES, map(int, arguments[0].split(",")), strict=True))
    for descriptor in files.values():
        os.set_inheritable(descriptor, False)
    try:
        agent = Agent(agent_config.load(Path(arguments[1]), files["config"]), files)
    except AgentError as error:
        print(error, file=sys.stderr)
        return AgentExit.TAKEN
    except (FtError, OSError) as error:
        print(error, file=sys.stderr)
        return AgentExit.MEMORY_TOO_SMALL if isinstance(error, MemoryTooSmall) else AgentExit.BAD_CONFIG
    try:
        agent.run()
    except Exception as error:
        # The keeper starts another one, which uses everything on: nothing is cleared away.
        agent.journal.write("error", "a defect ends this agent", error=repr(error))
        traceback.print_exc()
        os._exit(DEFECT)
    agent.close()
    return 0
