"""One agent: it feeds events to the protocol and carries out the effects in the world's memory and links."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

from tests.model_checker import port
from tests.model_checker.port import events, messages
from tests.model_checker.simulated.content import NOTHING, Age, Bytes, checksum
from tests.model_checker.simulated.election import Election
from tests.model_checker.simulated.link import WINDOW, Direction, Job, Link
from tests.model_checker.simulated.memory import Memory, digest_of
from tests.model_checker.simulated.repair import Part, Repair
from tests.model_checker.truth import Violation

if TYPE_CHECKING:
    from tests.model_checker.simulated.world import World

Task = tuple[Any, ...]


class Hello:
    """The first thing on a link that has come up: the far end's incarnation."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation

    def __str__(self) -> str:
        return f"hello of incarnation {self.incarnation}"


class Node:
    """The agent of one slot in one incarnation."""

    def __init__(self, world: World, slot: int, incarnation: int) -> None:
        setting = world.setting
        self.world, self.slot, self.alive = world, slot, True
        self.state = port.initial("run", slot, incarnation, setting.topology, durable=setting.shape.disk)
        group = setting.topology.group_of(slot)
        buffers = self.state.data_buffers, self.state.parity_buffers
        self.memory = Memory(group, slot, setting.chunk, *buffers)
        self.links: dict[int, Link] = {link.other(slot): link for link in world.links_of(slot)}
        self.strands: dict[Hashable, deque[Task]] = {}
        self.used: dict[Age, set[Hashable]] = {}
        self.disk: tuple[port.SnapshotId, int, list[Bytes]] | None = None
        """The snapshot being written to disk, its buffer and what that held at the beginning."""
        self.kept = False
        """Whether the next agent finds the memory of this one, which is dead."""
        self.took_up = False
        """Whether this agent has begun with the memory of another one."""
        self.former: set[int] = set()
        """Workers of the last agent that may still write to its memory."""
        self.election, self.repair = Election(self), Repair(self)
        self._events: deque[tuple[Any, Any]] = deque()
        self._dispatching = False

    def take_up(self, before: Node, former: set[int]) -> None:
        """Go on with the memory of a dead agent, some of whose workers may still write to it."""
        self.state = port.resumed(self.state, port.kept(before.state), sorted(former))
        self.memory, self.former, self.took_up = before.memory, former, True

    def worker_done(self, number: int) -> None:
        """Handle a worker of the last agent that is dead or has attached to this one."""
        if number in self.former:
            self.former.discard(number)
            self.dispatch(events.WorkerLost(number))

    # ---- the protocol

    def dispatch(self, event: Any, payload: Any = None) -> None:
        """Handle one event with all its effects, then those that came up meanwhile."""
        self._events.append((event, payload))
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._events:
                event, payload = self._events.popleft()
                before = self.state
                self.state, effects = self._step(before, event)
                self.world.truth.stepped(self, before, event, effects)
                for effect in effects:
                    EFFECTS[type(effect)](self, effect, payload)
        finally:
            self._dispatching = False

    def _step(self, state: port.State, event: Any) -> tuple[port.State, tuple[Any, ...]]:
        try:
            return port.step(state, event)
        except Exception as error:
            what = f"slot {self.slot} fails at {type(event).__name__}: {type(error).__name__}: {error}"
            raise Violation("I0", what) from error

    def route(self, sender: int, incarnation: int, message: Any) -> None:
        """Handle a message from an agent, which may be this one."""
        if isinstance(message, (messages.Decode, messages.Fetch)):
            self.election.catch_up(message.epoch)
        if isinstance(message, messages.Inventory):
            self.election.inventory(message)
        elif isinstance(message, messages.InventoryRequest):
            self.election.asked(sender, incarnation, message)
        else:
            self.dispatch(events.Received(sender, incarnation, message))
            self.election.heard(message)
            if isinstance(message, messages.ChunkLost):
                self.repair.source_lost(sender, message.snapshot, message.stripe)

    # ---- links

    @property
    def peers(self) -> list[int]:
        """Return the slots that this agent believes to have a link to."""
        return [slot for slot, link in self.links.items() if link.open[self.slot]]

    def send(self, to: int, message: Any, payload: Any = None) -> None:
        """Put a message on a link. It is lost if the link is not there any more."""
        link = self.links[to]
        if link.open[self.slot] and link.alive:
            link.to[to].queue.append((message, payload))
            self.world.flows.add((self.slot, to))

    def pump(self, to: int) -> None:
        """Take the next buckets of a chunk that is being sent from memory, if there is room on the link."""
        direction: Direction = self.links[to].to[to]
        while direction.jobs and len(direction.queue) < WINDOW:
            piece = next(direction.jobs[0].pieces, None)
            if piece is None:
                direction.jobs.popleft()
            else:
                self.send(to, *piece)

    def receive(self, sender: int, message: Any, payload: Any) -> None:
        """Handle what arrived over the link to `sender`."""
        node = self.world.nodes[sender]
        incarnation = node.state.incarnation
        if isinstance(message, Hello):
            self.links[sender].open[self.slot] = True
            self.dispatch(events.PeerConnected(sender, message.incarnation))
            self.election.connected(sender)
            self.repair.connected(sender)
        elif isinstance(message, port.Bucket):
            intact = checksum(payload) == message.sum
            self.dispatch(events.BucketArrived(sender, incarnation, message, intact), payload)
        elif isinstance(message, Part):
            self.repair.part(message, payload)
        else:
            self.route(sender, incarnation, message)

    def lose(self, slot: int) -> None:
        """Notice that the link to another agent is gone."""
        self.links[slot].open[self.slot] = False
        self.dispatch(events.PeerLost(slot))
        self.election.lost(slot)

    # ---- work on memory, in strands that keep their order

    def order(self, key: Hashable, task: Task, age: Age) -> None:
        self.used.setdefault(age, set()).add(key)
        self.strands.setdefault(key, deque()).append(task)
        self.world.strands.add((self.slot, key))

    def work(self, key: Hashable) -> None:
        """Do the next piece of work of a strand."""
        queue = self.strands[key]
        task = queue.popleft()
        if not queue:
            del self.strands[key]
            self.world.strands.discard((self.slot, key))
        TASKS[task[0]](self, *task[1:])

    def forget_strand(self, key: Hashable) -> None:
        if self.strands.pop(key, None) is not None:
            self.world.strands.discard((self.slot, key))

    def pieces(self, effect: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the buckets of a data chunk as memory holds them when their turn comes, then the end of the chunk."""
        for index in range(effect.start, len(effect.sums)):
            content = self.memory.data[effect.buffer][effect.first + index]
            message = port.Bucket(
                snapshot=effect.snapshot, stripe=effect.stripe, index=index, sum=effect.sums[index], size=1
            )
            yield message, content
        value = port.digest(effect.sums)
        count = len(effect.sums)
        yield port.ChunkEnd(snapshot=effect.snapshot, stripe=effect.stripe, count=count, digest=value), None


# ---- effects


def _accumulate(node: Node, effect: Any, payload: Any) -> None:
    key = ("parity", effect.buffer, effect.stripe)
    node.order(key, ("add", effect.buffer, effect.stripe, effect.index, effect.source, payload), effect.snapshot.age)


def _tell_worker(node: Node, effect: Any, payload: Any) -> None:
    if isinstance(effect, events.Grant):
        node.world.truth.granted(node, effect)
    node.world.trainer.told(node.slot, effect)


def _send(node: Node, effect: Any, payload: Any) -> None:
    if effect.to == node.slot:
        node.route(node.slot, node.state.incarnation, effect.message)
    else:
        node.send(effect.to, effect.message)


def _send_chunk(node: Node, effect: Any, payload: Any) -> None:
    link = node.links[effect.to]
    if not link.open[node.slot] or not link.alive:
        return
    jobs, age = link.to[effect.to].jobs, effect.snapshot.age
    for job in [job for job in jobs if (job.age, job.stripe) == (age, effect.stripe)]:
        jobs.remove(job)
    jobs.append(Job(age, effect.stripe, node.pieces(effect)))
    node.pump(effect.to)


def _stop_coding(node: Node, effect: Any, payload: Any) -> None:
    age = effect.snapshot.age
    for to, link in node.links.items():
        direction = link.to[to]
        direction.jobs = deque(job for job in direction.jobs if job.age != age)
    for key in sorted(node.used.pop(age, set()), key=repr):
        node.forget_strand(key)


def _verify(node: Node, effect: Any, payload: Any) -> None:
    node.order(("data", effect.buffer), ("verify", effect), effect.snapshot.age)


def _clear(node: Node, effect: Any, payload: Any) -> None:
    key = ("parity", effect.buffer, effect.stripe)
    node.world.truth.claimed(node, "parity", effect.buffer, effect.snapshot.age)
    node.forget_strand(key)
    node.order(key, ("clear", effect.buffer, effect.stripe), effect.snapshot.age)


def _finish(node: Node, effect: Any, payload: Any) -> None:
    node.order(("parity", effect.buffer, effect.stripe), ("finish", effect), effect.snapshot.age)


def _release(node: Node, effect: Any, payload: Any) -> None:
    node.used.pop(effect.snapshot.age, None)


def _commit(node: Node, effect: Any, payload: Any) -> None:
    if node.disk is None and node.world.setting.shape.disk and effect.snapshot.step % 3 == 0:
        node.dispatch(events.DurableStarted(effect.snapshot))


def _begin_epoch(node: Node, effect: Any, payload: Any) -> None:
    node.world.trainer.epoch_began(node.slot, effect.epoch)
    node.repair.begin_epoch()
    node.election.began(effect.epoch)


def _request(node: Node, effect: Any, payload: Any) -> None:
    node.election.request(effect.reason)


def _follow(node: Node, effect: Any, payload: Any) -> None:
    node.repair.follow(effect.orders)


def _decode(node: Node, effect: Any, payload: Any) -> None:
    node.repair.decode(effect.order)


def _send_part(node: Node, effect: Any, payload: Any) -> None:
    node.repair.send_chunk(effect.to, effect.snapshot, effect.stripe)


def _nothing(node: Node, effect: Any, payload: Any) -> None:
    """The truth has looked at it already, or it is for people."""


EFFECTS = {
    events.Accumulate: _accumulate,
    events.Grant: _tell_worker,
    events.Refuse: _tell_worker,
    events.Revoke: _tell_worker,
    events.Send: _send,
    events.SendChunk: _send_chunk,
    events.StopCoding: _stop_coding,
    events.Verify: _verify,
    events.ClearParity: _clear,
    events.FinishParity: _finish,
    events.Commit: _commit,
    events.Release: _release,
    events.BeginEpoch: _begin_epoch,
    events.RequestEpoch: _request,
    events.Decided: _nothing,
    events.FollowOrders: _follow,
    events.StartDecode: _decode,
    events.SendPart: _send_part,
    events.Log: _nothing,
}


# ---- tasks


def _do_add(node: Node, buffer: int, stripe: int, index: int, source: int, content: int) -> None:
    chunk = node.memory.parity[buffer][stripe]
    held = chunk[index]
    assert isinstance(held, frozenset)
    chunk[index] = held ^ {(source, content)}


def _do_clear(node: Node, buffer: int, stripe: int) -> None:
    node.memory.parity[buffer][stripe] = [NOTHING] * node.memory.buckets


def _do_verify(node: Node, effect: Any) -> None:
    data = node.memory.data[effect.buffer]
    bad = tuple(index for index, sum_ in enumerate(effect.sums) if checksum(data[index]) != sum_)
    node.dispatch(events.DataVerified(effect.snapshot, bad))


def _do_finish(node: Node, effect: Any) -> None:
    value = digest_of(node.memory.parity[effect.buffer][effect.stripe])
    node.dispatch(events.ParityVerified(effect.snapshot, effect.stripe, value))


def _do_solve(node: Node, key: tuple[Age, int]) -> None:
    node.repair.solve(key)


TASKS: dict[str, Callable[..., None]] = {
    "add": _do_add,
    "clear": _do_clear,
    "verify": _do_verify,
    "finish": _do_finish,
    "solve": _do_solve,
}
