"""The simulated world: agents, links, workers, disks, and the moves that change it.

A move is a tuple of its name and numbers. One that is not possible now does nothing, so any part of a history is a
history too.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from typing import Any

from tests.model_checker import port
from tests.model_checker.port import events
from tests.model_checker.setting import Setting
from tests.model_checker.simulated.content import Age, flipped
from tests.model_checker.simulated.link import Link
from tests.model_checker.simulated.node import Hello, Node
from tests.model_checker.simulated.repair import Part
from tests.model_checker.simulated.trainer import Trainer
from tests.model_checker.truth import Truth

Move = tuple[Any, ...]


class Choices:
    """A set from which one member is drawn at random in constant time."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._places: dict[Any, int] = {}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: Hashable) -> bool:
        return item in self._places

    def add(self, item: Hashable) -> None:
        if item not in self._places:
            self._places[item] = len(self._items)
            self._items.append(item)

    def discard(self, item: Hashable) -> None:
        place = self._places.pop(item, None)
        if place is not None:
            last = self._items.pop()
            if place < len(self._items):
                self._items[place] = last
                self._places[last] = place

    def draw(self, rng: random.Random) -> Any:
        return self._items[int(rng.random() * len(self._items))]


class World:
    """Everything there is in one history."""

    def __init__(self, setting: Setting, ignored: frozenset[str] = frozenset()) -> None:
        self.setting, self.slots = setting, setting.topology.slots
        self.totals = [sum(setting.geometry(slot).parts) for slot in range(self.slots)]
        """Buckets of each slot's state."""
        self.flows, self.strands = Choices(), Choices()
        """(from, to) with messages on their way, and (slot, strand) with work to do."""
        self.choices: dict[int, tuple[port.Decision, port.Orders]] = {}
        """What stands as the choice of an epoch: the first that was made."""
        self.chosen: dict[int, Age | None] = {}
        """What agents follow as the choice of an epoch."""
        self.links = {(a, b): Link(a, b) for b in range(self.slots) for a in range(b)}
        self.incarnations = self.slots
        self.salt = 0
        self.truth = Truth(self, ignored)
        self.nodes = [Node(self, slot, slot + 1) for slot in range(self.slots)]
        self.trainer = Trainer(self)
        for link in self.links.values():
            self.up(link.low, link.high)

    @property
    def newest_epoch(self) -> int:
        return max(self.choices, default=0)

    def links_of(self, slot: int) -> list[Link]:
        return [link for pair, link in self.links.items() if slot in pair]

    def link(self, a: int, b: int) -> Link:
        return self.links[min(a, b), max(a, b)]

    def do(self, move: Move) -> bool:
        """Make a move. Return whether it was possible."""
        return bool(getattr(self, move[0])(*move[1:]))

    # ---- progress

    def deliver(self, a: int, b: int, count: int = 1) -> bool:
        """Hand the next messages from a to b."""
        queue = self.link(a, b).to[b].queue
        if not queue:
            return False
        while queue and count:
            message, payload = queue.popleft()
            self.nodes[b].receive(a, message, payload)
            self.nodes[a].pump(b)
            count -= 1
        if not queue:
            self.flows.discard((a, b))
        return True

    def work(self, slot: int, key: Hashable, count: int = 1) -> bool:
        """Let a slot do the next pieces of work of a strand."""
        node = self.nodes[slot]
        if key not in node.strands:
            return False
        while count and key in node.strands:
            node.work(key)
            count -= 1
        return True

    def train(self) -> bool:
        """Let every worker do the next thing."""
        return sum(self.trainer.act(worker) for worker in self.trainer.all) > 0

    def act(self, slot: int, number: int) -> bool:
        return self.trainer.act(self.trainer.workers[slot][number])

    def verify(self, slot: int) -> bool:
        node = self.nodes[slot]
        if not node.alive or not node.election.verifying:
            return False
        node.election.verify()
        return True

    def tick(self, slot: int) -> bool:
        node = self.nodes[slot]
        if not node.alive or not node.election.wants_epoch:
            return False
        node.election.tick()
        return True

    def choose(self, slot: int) -> bool:
        node = self.nodes[slot]
        return node.alive and node.election.chooses and node.election.complete and node.election.choose(late=True)

    def poll(self, slot: int) -> bool:
        node = self.nodes[slot]
        if not node.alive or not node.election.may_read:
            return False
        node.election.poll()
        return True

    def retry(self, slot: int) -> bool:
        node = self.nodes[slot]
        if not node.alive or node.repair.idle:
            return False
        node.repair.retry()
        return True

    def write_disk(self, slot: int) -> bool:
        """End the disk's reading."""
        node = self.nodes[slot]
        if not node.alive or node.disk is None:
            return False
        self.truth.disk_ended(node)
        snapshot, node.disk = node.disk[0], None
        node.dispatch(events.DurableEnded(snapshot))
        return True

    def scrub(self, slot: int, which: int) -> bool:
        """Read one chunk of a committed copy."""
        node = self.nodes[slot]
        found = [(c, s) for c in node.state.copies if c.committed for s in sorted(c.good)] if node.alive else []
        if not found:
            return False
        copy, stripe = found[which % len(found)]
        node.dispatch(events.Scrubbed(copy.snapshot, stripe, self.truth.right(node, copy, stripe)))
        return True

    def burst(self, steps: int) -> bool:
        """Let so many steps pass before any message arrives: only workers act."""
        if self.trainer.restarting or self.setting.wait:
            return False
        for _ in range(steps * 3):
            for worker in self.trainer.all:
                self.trainer.act(worker)
        return True

    # ---- links

    def up(self, a: int, b: int) -> bool:
        """Connect two agents. The first learns of it now, the other when the first message arrives."""
        link = self.link(a, b)
        first, other = self.nodes[a], self.nodes[b]
        if link.alive or not first.alive or not other.alive:
            return False
        for node, slot in ((first, b), (other, a)):
            if link.open[node.slot]:
                node.lose(slot)
        link.alive, link.lossy = True, False
        link.session += 1
        link.open[a] = True
        first.send(b, Hello(first.state.incarnation))
        first.dispatch(events.PeerConnected(b, other.state.incarnation))
        first.election.connected(b)
        first.repair.connected(b)
        return True

    def down(self, a: int, b: int) -> bool:
        link = self.link(a, b)
        if not link.alive:
            return False
        link.down()
        self.flows.discard((a, b))
        self.flows.discard((b, a))
        return True

    def reset(self, a: int, b: int) -> bool:
        """Break a link that has lost something: nothing gets lost on one that stays."""
        return self.down(a, b)

    def notice(self, slot: int, other: int) -> bool:
        """Let an agent see that a link is gone."""
        link = self.link(slot, other)
        if link.alive or not link.open[slot] or not self.nodes[slot].alive:
            return False
        self.nodes[slot].lose(other)
        return True

    def away(self, slot: int, other: int) -> bool:
        """Let an agent find that another has been away for long."""
        if not self.nodes[slot].alive or self.link(slot, other).open[slot]:
            return False
        self.nodes[slot].dispatch(events.PeerAway(other))
        return True

    def absent(self, slot: int) -> bool:
        """Let an agent find that somebody whom a repair needs has been away for long."""
        node = self.nodes[slot]
        if not node.alive or not node.repair.awaited - set(node.peers):
            return False
        node.repair.give_up()
        return True

    def _on_its_way(self, a: int, b: int, index: int) -> int | None:
        """Return a place in the queue from a to b, but not that of the greeting."""
        queue = self.link(a, b).to[b].queue
        first = 1 if queue and isinstance(queue[0][0], Hello) else 0
        return first + index % (len(queue) - first) if len(queue) > first else None

    def drop(self, a: int, b: int, index: int) -> bool:
        place = self._on_its_way(a, b, index)
        if place is None:
            return False
        link = self.link(a, b)
        del link.to[b].queue[place]
        link.lossy = True
        if not link.to[b].queue:
            self.nodes[a].pump(b)
        if not link.to[b].queue:
            self.flows.discard((a, b))
        return True

    def double(self, a: int, b: int, index: int) -> bool:
        """Deliver a message a second time, at the end of what is on its way."""
        place = self._on_its_way(a, b, index)
        if place is None:
            return False
        queue = self.link(a, b).to[b].queue
        queue.append(queue[place])
        return True

    def reorder(self, a: int, b: int, index: int) -> bool:
        """Let the last message overtake another one."""
        place = self._on_its_way(a, b, index)
        if place is None:
            return False
        link = self.link(a, b)
        link.to[b].queue.insert(place, link.to[b].queue.pop())
        link.lossy = True  # an overtaken ChunkEnd asks again, an overtaken fact may be refused
        return True

    def damage(self, a: int, b: int, index: int) -> bool:
        """Change the payload of a message."""
        place = self._on_its_way(a, b, index)
        if place is None:
            return False
        queue = self.link(a, b).to[b].queue
        message, payload = queue[place]
        self.salt += 1
        if isinstance(message, port.Bucket):
            queue[place] = message, flipped(payload, self.salt)
        elif isinstance(message, Part) and payload:
            queue[place] = message, [flipped(payload[0], self.salt), *payload[1:]]
        return True

    # ---- other faults

    def kill(self, slot: int) -> bool:
        """End an agent, and its memory with it."""
        node = self.nodes[slot]
        if not node.alive or not self.truth.may_take(slot):
            return False
        self.truth.before_fault(node)
        self._end(node)
        self.truth.after_fault(f"the agent of slot {slot} dies")
        return True

    def disaster(self, slot: int) -> bool:
        """End an agent although its group cannot lose it."""
        node = self.nodes[slot]
        if not node.alive or self.truth.may_take(slot):
            return False
        self.truth.before_fault(node)
        self.truth.disaster()
        self._end(node)
        return True

    def _end(self, node: Node) -> None:
        node.alive = False
        for other, link in node.links.items():
            link.down()
            link.open[node.slot] = False
            self.flows.discard((node.slot, other))
            self.flows.discard((other, node.slot))
        for key in list(node.strands):
            node.forget_strand(key)

    def crash(self, slot: int) -> bool:
        """End an agent, whose memory is kept for the next one."""
        node = self.nodes[slot]
        if not node.alive or not self.truth.may_take(slot):
            return False
        self._crash(node)
        self.truth.after_fault(f"the agent of slot {slot} dies and leaves its memory")
        return True

    def _crash(self, node: Node) -> None:
        self.truth.before_crash(node)
        self._end(node)
        node.kept = True

    def lose(self, slot: int) -> bool:
        """Lose the memory that a dead agent has left."""
        node = self.nodes[slot]
        if node.alive or not node.kept:
            return False
        self.truth.before_fault(node)
        node.kept = False
        self.truth.after_fault(f"the memory of slot {slot} is lost")
        return True

    def reboot(self, *_: int) -> bool:
        """End all agents at once, and start others with their memory."""
        for node in [node for node in self.nodes if node.alive]:
            self._crash(node)
            self.start(node.slot)
        self.truth.after_fault("all agents die and others take up their memory")
        return True

    def start(self, slot: int) -> bool:
        """Start an agent in the place of a dead one, with its memory if that was kept, else an empty one."""
        before = self.nodes[slot]
        if before.alive:
            return False
        self.incarnations += 1
        self.nodes[slot] = Node(self, slot, self.incarnations)
        if before.kept:
            self.nodes[slot].take_up(before, self.trainer.attached(before))
        return True

    def rank(self, slot: int, number: int) -> bool:
        """End a rank, and so all of them."""
        if self.trainer.restarting:
            return False
        self.trainer.rank_died(self.trainer.workers[slot][number])
        return True

    def advance(self, slot: int) -> bool:
        """Let a supervisor begin an epoch."""
        node = self.nodes[slot]
        if not node.alive or node.state.epoch == 0:
            return False
        node.election.begin(max(node.state.epoch, self.newest_epoch) + 1)
        return True

    def late(self, slot: int) -> bool:
        """Let an agent's patience with silent slots end while they live."""
        node = self.nodes[slot]
        election = node.election
        if not node.alive or not election.ready or election.decision is not None or election.complete:
            return False
        return election.choose(late=True)

    def timeout(self, slot: int, number: int) -> bool:
        return self.trainer.give_up(self.trainer.workers[slot][number])

    def rot(self, slot: int, which: int, index: int) -> bool:
        """Flip a bit of a chunk that the agent holds for good."""
        node = self.nodes[slot]
        found = [(c, s) for c in node.state.copies for s in sorted(c.good)] if node.alive else []
        if not found or not self.truth.may_take(slot):
            return False
        copy, stripe = found[which % len(found)]
        used = copy.good[stripe].count
        if not used:
            return False
        self.truth.before_fault(node, copy.snapshot.age)
        self.salt += 1
        node.memory.flip(copy, stripe, index % used, self.salt)
        if node.disk is not None and node.disk[1] == copy.data:
            node.disk[2][:] = node.memory.data[copy.data]
        self.truth.after_fault(f"a bit flips in stripe {stripe} of slot {slot}")
        return True

    def spoil(self, slot: int, which: int) -> bool:
        """Flip a bit of data that workers have sealed and the agent has not read back."""
        node = self.nodes[slot]
        found = [c for c in node.state.copies if c.open and len(c.sums) == self.setting.workers and not c.verified]
        if not node.alive or not found:
            return False
        copy = found[0]
        first = node.memory.stripes[which % len(node.memory.stripes)]
        self.salt += 1
        node.memory.flip(copy, first, 0, self.salt)
        return True

    def flip(self, slot: int, which: int, index: int) -> bool:
        """Flip a bit of parity before its checksum is taken, so that nothing shows it."""
        node = self.nodes[slot]
        stripes = node.memory.parity_stripes
        found = [
            (c, s) for c in node.state.copies if c.open and c.parity is not None for s in stripes if s not in c.good
        ]
        if not node.alive or not found or not self.truth.may_take(slot):
            return False
        copy, stripe = found[which % len(found)]
        self.truth.before_fault(node, copy.snapshot.age)
        self.salt += 1
        node.memory.flip(copy, stripe, index % node.memory.buckets, self.salt)
        return True
