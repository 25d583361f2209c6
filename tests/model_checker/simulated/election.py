"""How an agent takes part in the choice of what to restore, step by step: advance, verify, choose once, pin, follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.model_checker import port
from tests.model_checker.port import Mode, events, messages
from tests.model_checker.simulated.memory import digest_of

if TYPE_CHECKING:
    from tests.model_checker.simulated.node import Node


class Election:
    """One agent's part in the choice of its current epoch."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.epoch = 0
        self.verifying = self.ready = False
        self.decision: port.Decision | None = None
        self.read = False
        """Whether the choice has been read together with its orders. The decision may be known earlier."""
        self.wanted = ""
        self._asked: list[tuple[int, int]] = []
        self._inventories: dict[int, Any] = {}

    # ---- starting

    def begin(self, epoch: int) -> None:
        self.node.dispatch(events.EpochAdvanced(epoch))

    def request(self, reason: str) -> None:
        self.wanted = reason

    @property
    def wants_epoch(self) -> bool:
        """Return whether this agent may begin the epoch that it needs: each is decided before the next."""
        return bool(self.wanted) and (self.node.state.mode is not Mode.RECOVERING or self.decision is not None)

    def tick(self) -> None:
        """Begin the epoch that this agent needs."""
        self.begin(max(self.node.state.epoch, self.node.world.newest_epoch) + 1)

    def began(self, epoch: int) -> None:
        self.epoch, self.decision, self.read, self.wanted = epoch, None, False, ""
        self._inventories, self._asked = {}, []
        self.verifying, self.ready = True, False
        for slot in self.node.peers:
            self.node.send(slot, messages.InventoryRequest(epoch=epoch))

    def verify(self) -> None:
        """Read all memory that may be chosen, then answer those that asked what it holds."""
        node, self.verifying = self.node, False
        epoch = self.epoch
        for copy in node.state.copies:
            if not copy.candidate:
                continue
            for record in list(copy.good.values()):
                chunk = node.memory.chunk(copy, record.stripe)
                if chunk is None or digest_of(chunk[: record.count]) != record.digest:
                    node.dispatch(events.Scrubbed(copy.snapshot, record.stripe, False))
        if epoch != self.epoch:
            return
        self.ready = True
        asked, self._asked = self._asked, []
        for slot, incarnation in (*asked, (node.slot, node.state.incarnation)):
            node.dispatch(events.Received(slot, incarnation, messages.InventoryRequest(epoch=epoch)))

    def asked(self, sender: int, incarnation: int, request: Any) -> None:
        if request.epoch != self.epoch:
            self.begin(request.epoch)
        if request.epoch != self.epoch:
            return
        if self.ready:
            self.node.dispatch(events.Received(sender, incarnation, request))
        else:
            self._asked.append((sender, incarnation))

    def connected(self, slot: int) -> None:
        if not self.epoch:
            return
        if self.decision is None:
            self.node.send(slot, messages.InventoryRequest(epoch=self.epoch))
        else:
            self.node.send(slot, self.decision)

    def lost(self, slot: int) -> None:
        if self.decision is None:
            self._inventories.pop(slot, None)

    # ---- choosing

    def inventory(self, inventory: Any) -> None:
        if inventory.epoch == self.epoch:
            self._inventories[inventory.slot] = inventory

    @property
    def chooses(self) -> bool:
        """Return whether this agent would choose now: the lowest slot that it has a link to, ready, not decided."""
        return self.ready and self.decision is None and not any(slot < self.node.slot for slot in self.node.peers)

    @property
    def complete(self) -> bool:
        """Return whether all agents that live have told what they hold."""
        world = self.node.world
        return all(
            slot in self._inventories and self._inventories[slot].incarnation == node.state.incarnation
            for slot, node in enumerate(world.nodes)
            if node.alive
        )

    def choose(self, *, late: bool) -> bool:
        """Choose from what has been told. Return whether that was possible."""
        node, world = self.node, self.node.world
        topology = node.state.topology
        verdict = port.choose(self._inventories, topology.groups, topology.slots, late=late)
        if verdict.wait:
            return False
        incarnations = tuple(
            self._inventories[slot].incarnation if slot in self._inventories else 0 for slot in range(topology.slots)
        )
        decision = port.Decision(epoch=self.epoch, snapshot=verdict.snapshot, incarnations=incarnations)
        orders = port.plan(self._inventories, topology.groups, decision)
        if self.epoch not in world.choices:
            world.choices[self.epoch] = decision, orders
            world.truth.chose(node, decision)
        for slot in node.peers:
            node.send(slot, world.choices[self.epoch][0])
        self._apply()
        return True

    @property
    def may_read(self) -> bool:
        """Return whether the choice of this epoch stands and this agent has not read it."""
        return bool(self.epoch) and not self.read and self.epoch in self.node.world.choices

    def poll(self) -> None:
        """Read the choice."""
        self._apply()

    def catch_up(self, epoch: int) -> None:
        """Read the choice of an epoch that a peer acts upon."""
        if epoch < self.node.state.epoch or (epoch == self.epoch and self.read):
            return
        if epoch in self.node.world.choices:
            self.begin(epoch)
            if epoch == self.epoch:
                self._apply()

    def heard(self, message: Any) -> None:
        if isinstance(message, port.Decision) and message.epoch == self.epoch:
            self.decision = self.decision or message
            self.catch_up(message.epoch)

    def _apply(self) -> None:
        self.decision, orders = self.node.world.choices[self.epoch]
        self.read = True
        self.node.dispatch(events.PlanRead(self.decision, orders))
