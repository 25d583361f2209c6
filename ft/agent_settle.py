"""How agents settle what an epoch restores: inventories go to the lowest living slot, its choice is written once.

Whatever is written first in the shared folder stands, whoever wrote it; agents that miss the message read the file.
"""

import time
from typing import TYPE_CHECKING, Any

from ft import events, recovery
from ft.agent_scrub import verify_all
from ft.messages import Decode, Inventory, InventoryRequest, Pin
from ft.state import Mode

if TYPE_CHECKING:
    from ft.agent import Agent

POLL = 0.3
"""Seconds between looks at the shared folder while an epoch is not settled."""
CONNECTED_GRACE = 5.0
"""Seconds that the choice waits for a connected agent whose answer could not change it: left out, it would need
another epoch to take part again."""
KNOWN_GRACE = 0.5
"""The same for an agent that has published where it listens and is not connected (yet)."""


class Settler:
    """One epoch at a time: ask, collect, choose, tell."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self._epoch = 0
        self._asked: set[int] = set()
        self._inventories: dict[int, Inventory] = {}
        self._began = self._deadline = 0.0
        self._next_look = 0.0
        self._orders: tuple[tuple[int, Decode], ...] = ()
        self._pin: Pin | None = None
        self._wanted: str = ""
        self._ready = False

    # ---- beginning

    def begin(self, epoch: int) -> None:
        """A worker, a supervisor or the protocol begins an epoch; nothing when it has begun already."""
        self._agent.feed(events.EpochAdvanced(epoch))

    def request(self, reason: str) -> None:
        """The protocol needs the next epoch to go on; asked for once, at the next tick."""
        if not self._wanted:
            self._agent.journal.write("info", "a new epoch is needed", reason=reason)
        self._wanted = reason

    def began(self, epoch: int) -> None:
        """The protocol has begun an epoch: verify the memory, then take part in the choice."""
        agent = self._agent
        self._epoch, self._pin, self._orders, self._wanted = epoch, None, (), ""
        self._inventories, self._asked, self._ready = {}, set(), False
        self._began = time.monotonic()
        self._deadline = self._began + agent.config.inventory_deadline
        agent.repair.begin_epoch()
        agent.connect_peers(everyone=True)
        for link in agent.network.links.values():
            link.send(InventoryRequest(epoch=epoch))  # tells them of the epoch; the answer matters to the chooser
        verify_all(agent, lambda: self._verified(epoch))

    def _verified(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._ready = True
            agent = self._agent
            for slot in self._asked:
                boot = agent.state.boot if slot == agent.config.slot else self._boot(slot)
                agent.feed(events.Received(slot, boot, InventoryRequest(epoch=epoch)))
            self._asked.clear()
            agent.feed(events.Received(agent.config.slot, agent.state.boot, InventoryRequest(epoch=epoch)))

    def asked(self, sender: int, request: InventoryRequest) -> None:
        """Someone wants this agent's inventory: it gets it once the memory has been verified."""
        if request.epoch > self._agent.state.epoch:
            self.begin(request.epoch)
        if request.epoch != self._epoch:
            return
        if self._ready:
            self._agent.feed(events.Received(sender, self._boot(sender), request))
        else:
            self._asked.add(sender)

    def connected(self, slot: int) -> None:
        link = self._agent.network.links.get(slot)
        if link is None or not self._epoch:
            return
        if self._pin is None:
            link.send(InventoryRequest(epoch=self._epoch))
        else:
            link.send(self._pin)
            for decoder, order in self._orders:
                if decoder == slot:
                    link.send(order)

    def catch_up(self, epoch: int) -> None:
        """Someone acts on a choice whose pin, on another link, has not come yet: read it where it was written first."""
        agent = self._agent
        settled = epoch < agent.state.epoch or agent.state.pinned_epoch >= epoch
        if settled or (written := agent.registry.choice(epoch)) is None:
            return
        self.begin(epoch)
        self._settled(written, ())

    # ---- collecting and choosing

    def inventory(self, inventory: Inventory) -> None:
        if inventory.epoch == self._epoch:
            self._inventories[inventory.slot] = inventory
            self._choose(time.monotonic())

    def tick(self, now: float) -> None:
        agent = self._agent
        agent.repair.tick(now)
        if self._wanted and agent.state.mode is not Mode.SETTLING:
            self.begin(max(agent.state.epoch, agent.registry.newest_epoch()) + 1)
        if not self._epoch or self._pin is not None or now < self._next_look:
            return
        self._next_look = now + POLL
        written = agent.registry.choice(self._epoch)
        if written is not None:
            self._settled(written, ())
        else:
            self._choose(now)

    def _choose(self, now: float) -> None:
        """The lowest slot that is connected chooses; others do when it stays silent past the deadline."""
        agent = self._agent
        first = min([agent.config.slot, *agent.network.links]) == agent.config.slot
        late = now > self._deadline + (0.0 if first else agent.config.inventory_deadline)
        if self._pin is not None or not self._ready or not (first or late):
            return
        topology = agent.state.topology
        if self._unheard(now):
            return
        expected = range(topology.slots)
        answer = recovery.choose(self._inventories, topology.groups, expected, now > self._deadline)
        if isinstance(answer, recovery.Wait):
            return
        snapshot = answer.snapshot if isinstance(answer, recovery.Choice) else None
        if isinstance(answer, recovery.FallBack):
            agent.registry.explain(self._epoch, answer.reason)
            agent.journal.write("info", "nothing in memory is restored", epoch=self._epoch, reason=answer.reason)
        lives = tuple(
            self._inventories[slot].boot if slot in self._inventories else 0 for slot in range(topology.slots)
        )
        pin = agent.registry.choose(Pin(epoch=self._epoch, snapshot=snapshot, lives=lives))
        orders: tuple[tuple[int, Decode], ...] = ()
        if pin.snapshot is not None:
            present = [slot for slot, boot in enumerate(pin.lives) if boot]
            orders = recovery.plan(self._inventories, topology.groups, pin.snapshot, self._epoch, present)
        for link in agent.network.links.values():
            link.send(pin)
        self._settled(pin, orders)

    def _unheard(self, now: float) -> bool:
        """Whether agents that can be expected to answer at once have not."""
        registry, links = self._agent.registry, self._agent.network.links
        missing = set(range(self._agent.state.topology.slots)) - self._inventories.keys()
        if now < self._began + CONNECTED_GRACE and missing & links.keys():
            return True
        return now < self._began + KNOWN_GRACE and any(registry.endpoint(slot) is not None for slot in missing)

    def _settled(self, pin: Pin, orders: tuple[tuple[int, Decode], ...]) -> None:
        agent = self._agent
        self._pin, self._orders = pin, orders
        agent.feed(events.Received(agent.config.slot, agent.state.boot, pin))
        agent.connect_peers(everyone=False)
        for decoder, order in orders:
            if decoder == agent.config.slot:
                agent.feed(events.Received(decoder, agent.state.boot, order))
            elif (link := agent.network.links.get(decoder)) is not None:
                link.send(order)

    def heard(self, message: Any) -> None:
        """A pin that came from the chooser settles the epoch here as well."""
        if isinstance(message, Pin) and message.epoch == self._epoch and self._pin is None:
            self._pin = message
            self._agent.connect_peers(everyone=False)

    def _boot(self, slot: int) -> int:
        link = self._agent.network.links.get(slot)
        return link.theirs.boot if link is not None and link.theirs is not None else 0
