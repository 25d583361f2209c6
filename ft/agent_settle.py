"""How agents settle what an epoch restores: inventories go to the lowest living slot, its choice is written once.

Whatever is written first in the shared folder stands, whoever wrote it. It also says who decodes what, and every agent
reads it there: a message only tells that it is time to.
"""

import time
from typing import TYPE_CHECKING, Any

from ft import events, recovery
from ft.agent_registry import Choice
from ft.agent_scrub import verify_all
from ft.messages import Decision, Inventory, InventoryRequest
from ft.state import Mode

if TYPE_CHECKING:
    from ft.agent import Agent

POLL = 0.3
"""Seconds between looks at the shared folder while an epoch is not settled."""
CONNECTED_GRACE = 5.0
"""Seconds that the choice waits for a connected agent whose answer could not change it: left out, it would need
another epoch to take part again. They begin when the chooser has verified its own memory, and as long as that took is
added: verifying another agent's memory takes about as long, and whoever were slower would never be waited for."""
KNOWN_GRACE = 0.5
"""The same for an agent that has published where it listens and is not connected (yet)."""


class RecoveryElection:
    """One epoch at a time: ask, collect, choose, tell."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self._epoch = 0
        self._asked: set[int] = set()
        self._inventories: dict[int, Inventory] = {}
        self._began = self._verified_at = self._deadline = 0.0
        self._next_look = 0.0
        self._decide: Decision | None = None
        self.choice: Choice | None = None
        """Of the present epoch, once it was read: the decision may be known before."""
        self._wanted: str = ""
        self._ready = False

    # ---- beginning

    def begin(self, epoch: int) -> None:
        """A worker, a supervisor or the protocol begins an epoch; nothing when it has begun already."""
        self._agent.dispatch(events.EpochAdvanced(epoch))

    def request(self, reason: str) -> None:
        """The protocol needs the next epoch to go on; asked for once, at the next tick."""
        if not self._wanted:
            self._agent.journal.write("info", "a new epoch is needed", reason=reason)
        self._wanted = reason

    def began(self, epoch: int) -> None:
        """The protocol has begun an epoch: verify the memory, then take part in the choice."""
        agent = self._agent
        self._epoch, self._decide, self.choice, self._wanted = epoch, None, None, ""
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
            self._ready, self._verified_at = True, time.monotonic()
            self._deadline = max(self._deadline, self._patience(CONNECTED_GRACE))
            agent = self._agent
            for slot in self._asked:
                incarnation = agent.state.incarnation if slot == agent.config.slot else self._incarnation(slot)
                agent.dispatch(events.Received(slot, incarnation, InventoryRequest(epoch=epoch)))
            self._asked.clear()
            agent.dispatch(events.Received(agent.config.slot, agent.state.incarnation, InventoryRequest(epoch=epoch)))

    def asked(self, sender: int, request: InventoryRequest) -> None:
        """Someone wants this agent's inventory: it gets it once the memory has been verified."""
        if request.epoch > self._agent.state.epoch:
            self.begin(request.epoch)
        if request.epoch != self._epoch:
            return
        if self._ready:
            self._agent.dispatch(events.Received(sender, self._incarnation(sender), request))
        else:
            self._asked.add(sender)

    def connected(self, slot: int) -> None:
        link = self._agent.network.links.get(slot)
        if link is None or not self._epoch:
            return
        if self._decide is None:
            link.send(InventoryRequest(epoch=self._epoch))
        else:
            link.send(self._decide)

    def lost(self, slot: int) -> None:
        """What an agent said counts while it is there: it may come back with an empty memory, or not at all."""
        if self._decide is None:
            self._inventories.pop(slot, None)

    def catch_up(self, epoch: int) -> None:
        """A peer acts on a decision that has not come over its own link yet: read it where it was written first."""
        agent = self._agent
        if epoch < agent.state.epoch or (epoch == self._epoch and self.choice is not None):
            return
        written = agent.registry.choice(epoch)
        if written is not None:
            self.begin(epoch)
            self._settled(written)

    # ---- collecting and choosing

    def inventory(self, inventory: Inventory) -> None:
        if inventory.epoch == self._epoch:
            self._inventories[inventory.slot] = inventory
            self._choose(time.monotonic())

    def tick(self, now: float) -> None:
        agent = self._agent
        agent.repair.tick(now)
        # One epoch is settled before the next: also by an agent that the choice left out, which stays RECOVERING.
        if self._wanted and (agent.state.mode is not Mode.RECOVERING or self._decide is not None):
            self.begin(max(agent.state.epoch, agent.registry.newest_epoch()) + 1)
        if not self._epoch or self.choice is not None or now < self._next_look:
            return
        self._next_look = now + POLL
        written = agent.registry.choice(self._epoch)
        if written is not None:
            self._settled(written)
        elif self._decide is None:
            self._choose(now)

    def _choose(self, now: float) -> None:
        """The lowest slot that is connected chooses; others do when it stays silent past the deadline."""
        agent = self._agent
        first = min([agent.config.slot, *agent.network.links]) == agent.config.slot
        late = now > self._deadline + (0.0 if first else agent.config.inventory_deadline)
        if self._decide is not None or not self._ready or not (first or late):
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
            reason = self._whole_reason(answer.reason)
            agent.registry.explain(self._epoch, reason)
            agent.journal.write("info", "nothing in memory is restored", epoch=self._epoch, reason=reason)
        incarnations = tuple(
            self._inventories[slot].incarnation if slot in self._inventories else 0 for slot in range(topology.slots)
        )
        present = [slot for slot, incarnation in enumerate(incarnations) if incarnation]
        orders = recovery.plan(self._inventories, topology.groups, snapshot, self._epoch, present) if snapshot else ()
        decision = Decision(epoch=self._epoch, snapshot=snapshot, incarnations=incarnations)
        choice = agent.registry.choose(Choice(decision=decision, orders=orders))
        for link in agent.network.links.values():
            link.send(choice.decision)
        self._settled(choice)

    def _whole_reason(self, reason: str) -> str:
        """With that of the epoch before, when it had nothing to restore and so gave up what was left."""
        registry = self._agent.registry
        before = registry.newest_epoch()
        choice = registry.choice(before)
        if not reason.startswith(recovery.NOTHING_HELD) or choice is None or choice.decision.snapshot is not None:
            return reason
        earlier = registry.reason(before)
        return earlier if earlier.startswith(recovery.NOTHING_HELD) else f"{reason}; in epoch {before}: {earlier}"

    def _unheard(self, now: float) -> bool:
        """Whether agents that can be expected to answer at once have not."""
        registry, links = self._agent.registry, self._agent.network.links
        missing = set(range(self._agent.state.topology.slots)) - self._inventories.keys()
        if now < self._patience(CONNECTED_GRACE) and missing & links.keys():
            return True
        return now < self._patience(KNOWN_GRACE) and any(registry.endpoint(slot) is not None for slot in missing)

    def _patience(self, grace: float) -> float:
        """Until when an answer that could not change the choice is waited for."""
        return self._verified_at + (self._verified_at - self._began) + grace

    def _settled(self, choice: Choice) -> None:
        agent = self._agent
        self._decide, self.choice = choice.decision, choice
        agent.dispatch(events.Received(agent.config.slot, agent.state.incarnation, choice.decision))
        agent.connect_peers(everyone=False)
        agent.repair.take_orders()

    def heard(self, message: Any) -> None:
        """A decision that came from another agent ends the election here as well; its orders are read from the folder."""
        if not isinstance(message, Decision) or message.epoch != self._epoch:
            return
        if self._decide is None:
            self._decide = message
            self._agent.connect_peers(everyone=False)
        self.catch_up(message.epoch)

    def _incarnation(self, slot: int) -> int:
        link = self._agent.network.links.get(slot)
        return link.theirs.incarnation if link is not None and link.theirs is not None else 0
