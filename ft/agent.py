"""The snapshot agent of one node: `python -P -m ft.agent CONFIG.json`.

The shell around `ft.protocol`: it owns the sockets, the memory, the threads and the clock, feeds what happens into the
pure protocol one event at a time and carries out what the protocol wants done. It decides nothing about snapshots.
"""

import collections
import os
import selectors
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from ft import agent_config, events
from ft.agent_chunks import READ_STRIPE, Outbox
from ft.agent_coding import Crew
from ft.agent_config import AgentConfig
from ft.agent_durable import DurableWriter
from ft.agent_effects import Arrived, Effects
from ft.agent_folder import clear, sweep, take_lock
from ft.agent_log import Journal
from ft.agent_memory import Memory, Shape
from ft.agent_reads import Reads
from ft.agent_registry import Registry
from ft.agent_repair import Repair
from ft.agent_scrub import Scrub
from ft.agent_settle import Settler
from ft.agent_workers import Desk, Guest
from ft.auth import load_secret, nonce
from ft.contents import Bytes
from ft.erasure import Codec
from ft.errors import AgentError, FtError, MemoryTooSmall
from ft.link import Link
from ft.messages import (
    Bucket,
    Cancel,
    Decode,
    Fetch,
    Hello,
    Inventory,
    InventoryRequest,
    Open,
    Part,
    Read,
    Restore,
    Save,
    Seal,
    StatusRequest,
    Wire,
)
from ft.network import Network
from ft.protocol import step
from ft.state import State, initial

TICK = 0.05
LOOK = 0.25
"""Seconds between two looks of an agent without workers whether its slot is still its own."""
FAREWELL = 60.0
"""Seconds that an agent which was asked to end leaves its workers to save and end."""


class Agent:
    """One life of one slot's memory."""

    def __init__(self, config: AgentConfig) -> None:
        """Takes the memory and opens the sockets. Raises `AgentError` when the slot's agent runs already."""
        self.config = config
        self.folder = agent_config.private_folder(Path(config.folder))
        self._lock = take_lock(self.folder)
        self.registry = Registry(Path(config.shared))
        self.journal = Journal(self.registry.folder / f"agent-{config.slot}.log", slot=config.slot)
        for left in sweep(self.folder.parent, self.folder):
            self.journal.write("info", "removed what a killed agent left", folder=left)
        secret = load_secret(Path(config.secret))
        topology = config.topology
        durable = config.durable is not None
        self.state: State = initial(config.run, config.slot, time.time_ns(), topology, durable=durable)
        group = self.state.group
        self.codec = Codec(group.data, group.parity, kernel=config.kernel)
        shape = Shape.of(config.slot_bytes, config.bucket_bytes, group)
        slots = {"data_slots": self.state.data_slots, "parity_slots": self.state.parity_slots}
        self.memory = Memory(shape, config.slot, **slots)
        self.selector = selectors.DefaultSelector()
        self.crew = Crew(self.selector, config.threads)
        self.outbox = Outbox()
        self._events: collections.deque[tuple[events.Event, Arrived | None]] = collections.deque()
        self._feeding = False
        self._free: list[Bytes] = []
        self._receiving: dict[Link, Bytes] = {}
        self._missing: dict[int, float] = {}
        mine = Hello(role="agent", run=config.run, slot=config.slot, epoch=0, boot=self.state.boot, nonce=nonce())
        self.network = Network(
            self.selector, self, mine=mine, secret=secret, bind=(config.host, config.port),
            resolve=self.registry.resolve, payload_limit=config.bucket_bytes, rate=config.rate,
            silence=config.silence,
        )  # fmt: skip
        self.effects = Effects(self)
        self.repair = Repair(self)
        self.reads = Reads(self)
        self.settler = Settler(self)
        self.scrub = Scrub(self)
        self.durable = DurableWriter(self, config.durable) if config.durable is not None else None
        self.desk = Desk(
            self.selector, config.socket, mine=mine, secret=secret, payload_limit=config.bucket_bytes,
            on_geometry=self.effects.configured, on_lost=lambda worker: self.feed(events.WorkerLost(worker)),
            on_message=self._from_guest, on_drained=self.outbox.drained, on_gone=self._gone,
            log=self.journal.write, descriptors=lambda: [slot.descriptor for slot in self.memory.data],
            capacity=(shape.chunk * shape.group.data, shape.chunk),
        )  # fmt: skip
        self.registry.publish(config.slot, self.network.address, self.state.boot)
        self.connect_peers(everyone=False)
        self._ended = ""
        self._next_look = 0.0
        self._leaves: tuple[str, float] | None = None
        """The signal that asked this agent to end, and when."""
        self.journal.write("info", "started", pid=os.getpid(), bytes=self.memory.bytes, address=self.network.address)

    # ---- life

    def run(self) -> str:
        """Serve until the job ends, the lease runs out or SIGTERM comes; returns why.

        Batch systems signal every process of a job. What they say is meant for those who train and are about to save:
        asked to end, an agent does so once its workers have left and what they gave it is on disk.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        next_tick = 0.0
        while not self._ended:
            for key, mask in self.selector.select(TICK):
                if not self._ended:
                    key.data.ready(mask)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK
                self._tick(now)
        return self._ended

    def end(self, reason: str) -> None:
        self._ended = reason

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._leaves = self._leaves or (signal.Signals(number).name, time.monotonic())

    def close(self) -> None:
        """Leave nothing behind: sockets, endpoint, folder and, with the last mapping, the memory."""
        self.journal.write("info", "ended", reason=self._ended)
        if self.durable is not None:
            self.durable.close()
        self.desk.close()
        self.network.close()
        self.crew.close()
        self.selector.close()
        self.memory.close()
        self.registry.withdraw(self.config.slot, self.state.boot)
        clear(self.folder, self._lock)
        self.journal.close()

    def _tick(self, now: float) -> None:
        self.network.tick(now)
        self.desk.tick(now)
        self._look_for_peers(now)
        self.settler.tick(now)
        self.scrub.tick(now)
        busy = self.durable is not None and self.durable.busy
        over = self.desk.ended and not self.desk.workers
        unneeded = now - self.desk.last_seen > self.config.lease
        if self.durable is not None and (over or unneeded) and not self.network.links:
            self.durable.abandon()
        if over and not busy:
            self.end("end of the job")
        elif self._leaves and ((not self.desk.workers and not busy) or now - self._leaves[1] > FAREWELL):
            self.end(self._leaves[0])
        elif unneeded and not busy:
            self.end(f"nobody has needed this agent for {self.config.lease:g} s")
        elif not self.desk.workers and now >= self._next_look:
            self._next_look = now + LOOK
            endpoint = self.registry.endpoint(self.config.slot)
            if endpoint is not None and endpoint.boot > self.state.boot:
                # Its supervisor has died. Peers that stay connected with this agent would not meet the other one.
                self.end("the slot has another agent, on another node")

    @property
    def _near(self) -> set[int]:
        """The group and the neighbours in the tree: without them nothing is committed."""
        return {*self.state.group.members, *self.state.topology.neighbours(self.config.slot)}

    def connect_peers(self, *, everyone: bool) -> None:
        """Stay connected with those that commits need; with `everyone` with all, for as long as is needed."""
        needed = self.reads.awaited | self.repair.awaited
        wanted = range(self.state.topology.slots) if everyone else self._near | needed | self.network.links.keys()
        self.network.set_peers(wanted, needed)

    def _look_for_peers(self, now: float) -> None:
        missing = self._near - self.network.links.keys() - {self.config.slot}
        self._missing = {slot: self._missing.get(slot, now) for slot in missing}
        for slot, since in self._missing.items():
            if now - since > self.config.silence and slot not in self.state.away:
                self.feed(events.PeerAway(slot))

    # ---- the protocol

    def feed(self, event: events.Event, arrived: Arrived | None = None) -> None:
        """One event after the other, and of each all effects before the next; `arrived` belongs to `event`."""
        self._events.append((event, arrived))
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                event, arrived = self._events.popleft()
                self.state, effects = step(self.state, event)
                self.effects.arrived = arrived
                for effect in effects:
                    self.effects.carry_out(effect)
        finally:
            self._feeding = False

    def deliver(self, sender: int, boot: int, message: Any) -> None:
        """A message of an agent, this one included."""
        if isinstance(message, (Decode, Fetch, Read)):
            self.settler.catch_up(message.epoch)
        if isinstance(message, Inventory):
            self.settler.inventory(message)
        elif isinstance(message, InventoryRequest):
            self.settler.asked(sender, message)
        elif isinstance(message, Read):
            self.reads.for_peer(sender, message)
        else:
            self.feed(events.Received(sender, boot, message))
            self.settler.heard(message)

    # ---- Handler of the links to other agents

    def connected(self, link: Link) -> None:
        self.network.opened(link)
        if not link.closed and link.theirs is not None:
            self.journal.write("info", "connected", peer=link.slot)
            self.feed(events.PeerConnected(link.slot, link.theirs.boot))
            self.settler.connected(link.slot)
            self.repair.connected(link.slot)
            self.reads.connected(link.slot)

    def lost(self, link: Link, reason: str) -> None:
        slot = link.theirs.slot if link.theirs is not None else -1
        self._gone(link)
        self.network.forget(link)
        self.journal.write("warning", "lost a peer", peer=slot, reason=reason)
        if slot not in self.network.links:
            self.feed(events.PeerLost(slot))
            self.settler.lost(slot)

    def refused(self, link: Link, reason: str) -> None:
        self.network.forget(link)
        if not link.dialled:
            self.journal.write("warning", "refused a connection", peer=link.label, reason=reason)

    def target(self, link: Link, message: Wire, size: int) -> memoryview | None:
        if isinstance(message, Part):
            if message.stripe == READ_STRIPE:
                return self.reads.target(message, size)
            self.settler.catch_up(message.epoch)
            return self.repair.target(message, size)
        if isinstance(message, Bucket) and size <= self.config.bucket_bytes:
            self._receiving[link] = self.buffer()
            return self._receiving[link][:size].data
        return None

    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None:
        assert link.theirs is not None
        sender, boot = link.slot, link.theirs.boot
        strand = ("link", id(link))
        if isinstance(message, Bucket) and payload is not None:
            self._bucket(link, strand, message, payload)
        elif isinstance(message, Part):
            (self.reads if message.stripe == READ_STRIPE else self.repair).part(message, payload)
        elif self.crew.busy(strand):
            self.crew.order(strand, lambda: None, lambda _: self.deliver(sender, boot, message))
        else:
            self.deliver(sender, boot, message)

    def drained(self, link: Link) -> None:
        self.outbox.drained(link)

    def buffer(self) -> Bytes:
        """A receive buffer of one bucket; give it back with `release`."""
        return self._free.pop() if self._free else self.effects.new_buffer()

    def release(self, buffer: Bytes) -> None:
        self._free.append(buffer)

    def _bucket(self, link: Link, strand: Any, message: Bucket, payload: memoryview) -> None:
        """Checksum a bucket on a thread, then let the protocol decide what becomes of it."""
        assert link.theirs is not None
        sender, boot, data = link.slot, link.theirs.boot, self._receiving.pop(link)
        link.pause()  # what follows waits in the sockets: one bucket of a peer takes memory here

        def arrived(intact: bool) -> None:
            bucket = Arrived(data[: message.size], lambda: self._done_with(link, data))
            self.feed(events.BucketArrived(sender, boot, message, intact), bucket)
            if not bucket.wanted:
                bucket.done()

        self.crew.order(strand, lambda: self.effects.intact(message, payload), arrived)

    def _done_with(self, link: Link, data: Bytes) -> None:
        self.release(data)
        link.resume()

    def _gone(self, link: Link) -> None:
        self.outbox.forget(link)
        if (buffer := self._receiving.pop(link, None)) is not None:
            self.release(buffer)

    # ---- messages of workers

    def _from_guest(self, guest: Guest, message: Wire) -> None:
        if isinstance(message, StatusRequest):
            guest.link.send(self.effects.status())
            return
        if isinstance(message, Restore) and guest.role == "supervisor":
            self.settler.begin(message.epoch)
            return
        if isinstance(message, Save) and guest.role == "supervisor":
            if self.durable is not None:
                self.durable.save(message.epoch)
            return
        if guest.attach is None or not guest.attached:
            guest.link.close(f"{type(message).__name__} before it was attached")
            return
        worker = guest.attach.worker
        if isinstance(message, Open):
            self.feed(events.WorkerOpened(worker, message.snapshot, message.wait))
        elif isinstance(message, Seal):
            self.feed(events.WorkerSealed(worker, message.snapshot, message.sums))
        elif isinstance(message, Cancel):
            self.feed(events.WorkerCancelled(worker, message.snapshot))
        elif isinstance(message, Restore):
            guest.waits_for_epoch = message.epoch
            if message.epoch > self.state.epoch:
                self.settler.begin(message.epoch)
            self.effects.answer_restores()
        elif isinstance(message, Read):
            self.reads.for_worker(guest.link, message)
        else:
            guest.link.close(f"{type(message).__name__} is not for agents")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -P -m ft.agent CONFIG.json", file=sys.stderr)
        return 2
    try:
        agent = Agent(agent_config.load(Path(arguments[0])))
    except AgentError as error:
        print(error, file=sys.stderr)
        return 3
    except FtError as error:
        print(error, file=sys.stderr)
        return 4 if isinstance(error, MemoryTooSmall) else 2
    try:
        agent.run()
    except Exception as error:
        agent.journal.write("error", "a defect ends this agent", error=repr(error))
        agent.end(f"defect: {error!r}")
        raise
    finally:
        agent.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
