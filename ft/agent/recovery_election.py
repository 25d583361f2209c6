"""Agree on the snapshot to restore. Agents send inventories to the lowest live slot, which writes the decision once.

The first decision written to the shared folder stands, whichever agent wrote it. It includes the decoding plan, and
every agent reads it from there: messages only signal that it is ready. What peers ask meanwhile is put off.

Agents tell of an epoch along their usual links and connect to the lowest slots, which connect to all. Another agent
connects to all only if it knows of no lower one. So an epoch takes a few links for each agent, never one for each pair.
"""

import functools
from typing import Any

from keepwarm.ft.agent.scrubber import verify_all
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.discovery.registry import REASON_LIMIT, Choice
from keepwarm.ft.protocol import events, restore_choice
from keepwarm.ft.protocol.messages import Decision, Decode, Fetch, Inventory, InventoryRequest, Read
from keepwarm.ft.protocol.state import Mode

SETTLE_POLL_INTERVAL_S = 0.3
"""Interval at which the shared folder is checked until an epoch is decided, in seconds."""
WARNING_INTERVAL_S = 10.0
"""Interval between two log lines on a choice that cannot be written, in seconds."""
CONNECTED_GRACE = 5.0
"""Seconds to wait for a connected agent whose answer could not change the choice. An agent that is left out needs
another epoch to take part again. The wait starts when the chooser has verified its own memory and is extended by the
time that took: other agents need about as long, and a slower one would otherwise always be left out."""
FOLDER_PATIENCE_S = 2.0
"""How long an agent that needs an epoch waits for the shared folder to say which one is the newest, in seconds."""
PUT_OFF_LIMIT = 4096
"""Requests of peers that may wait for a choice to be read."""
CHOOSERS = 3
"""Number of the lowest slots to which every agent connects while an epoch is not decided."""
GATHER_AFTER_S = 1.0
"""How long another agent that has no link to a lower slot waits for one before it connects to all, in seconds."""
KNOWN_GRACE = 0.5
"""As `CONNECTED_GRACE`, for an agent that has published its endpoint but is not connected (yet)."""


class RecoveryElection:
    """Runs one epoch at a time: request inventories, collect them, choose, announce."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._epoch = 0
        self._asked: set[int] = set()
        self._inventories: dict[int, Inventory] = {}
        self._began = self._verified_at = self._deadline = 0.0
        self._next_look = self._next_warning = 0.0
        self._decision: Decision | None = None
        self._read = False
        """Whether the choice of the current epoch has been read. The decision may be known earlier."""
        self.choice: Choice | None = None
        """The newest choice that was read."""
        self._waits_for: tuple[int, ...] = ()
        self._wanted: str = ""
        self._wanted_at = 0.0
        self._ready = self._gathers = False
        self._put_off: list[tuple[int, int, Decode | Fetch | Read]] = []

    # ---- starting an epoch

    def begin(self, epoch: int) -> None:
        """Start an epoch for a worker, a supervisor or the protocol. Do nothing if it has already begun."""
        self._shell.dispatch(events.EpochAdvanced(epoch))

    def request(self, reason: str) -> None:
        """Request the next epoch, which the protocol needs to proceed. It is requested once, at the next tick."""
        if not self._wanted:
            self._shell.journal.write("info", "a new epoch is needed", reason=reason)
            self._wanted_at = self._shell.clock()
            self._shell.shared.look_newest()
        self._wanted = reason

    def began(self, epoch: int) -> None:
        """Handle the start of an epoch: verify the memory, then take part in the election."""
        shell = self._shell
        self._epoch, self._decision, self._read, self._wanted, self._waits_for = epoch, None, False, "", ()
        self._inventories, self._asked, self._ready = {}, set(), False
        self._began = self._shell.clock()
        self._deadline = self._began + shell.config.inventory_deadline
        self._gathers = shell.config.slot < CHOOSERS
        shell.connect_peers(everyone=self._gathers)
        for link in shell.network.links.values():
            link.send(InventoryRequest(epoch=epoch))  # announces the epoch; only the chooser uses the answers
        verify_all(shell, lambda: self._verified(epoch))

    def _verified(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._ready, self._verified_at = True, self._shell.clock()
            self._deadline = max(self._deadline, self._patience(CONNECTED_GRACE))
            shell = self._shell
            for slot in self._asked:
                incarnation = shell.state.incarnation if slot == shell.config.slot else self._incarnation(slot)
                shell.dispatch(events.Received(slot, incarnation, InventoryRequest(epoch=epoch)))
            self._asked.clear()
            shell.dispatch(events.Received(shell.config.slot, shell.state.incarnation, InventoryRequest(epoch=epoch)))

    def asked(self, sender: int, request: InventoryRequest) -> None:
        """Answer a request for this agent's inventory once the memory has been verified."""
        if request.epoch != self._epoch:
            self.begin(request.epoch)
        if request.epoch != self._epoch:
            return
        if self._ready:
            self._shell.dispatch(events.Received(sender, self._incarnation(sender), request))
        else:
            self._asked.add(sender)

    def connected(self, slot: int) -> None:
        link = self._shell.network.links.get(slot)
        if link is None or not self._epoch:
            return
        if self._decision is None:
            link.send(InventoryRequest(epoch=self._epoch))
        else:
            link.send(self._decision)

    def lost(self, slot: int) -> None:
        """Discard a lost agent's inventory: it may come back with empty memory, or not at all."""
        if self._decision is None:
            self._inventories.pop(slot, None)

    def catch_up(self, epoch: int) -> bool:
        """Read a decision from the shared folder if a peer acts on it and it has not been read. Return whether so."""
        shell = self._shell
        if epoch < shell.state.epoch or (epoch == self._epoch and self._read):
            return False
        shell.shared.choice(epoch, self._arrived)
        return True

    def put_off(self, sender: int, incarnation: int, message: Decode | Fetch | Read) -> None:
        """Keep a peer's request until the choice that it follows has been read. If there are many, it asks again."""
        if len(self._put_off) < PUT_OFF_LIMIT:
            self._put_off.append((sender, incarnation, message))

    def _arrived(self, choice: Choice | None) -> None:
        """Follow a choice that has been read from the shared folder, unless that has been done."""
        if choice is None:
            return
        epoch = choice.decision.epoch
        if epoch != self._epoch:
            self.begin(epoch)
        if epoch == self._epoch and not self._read:
            self._decided(choice)

    # ---- collecting and choosing

    @property
    def awaited(self) -> set[int]:
        """Return the slots that this agent is to be connected with because one of them chooses."""
        undecided = self._epoch and self._decision is None
        return set(range(min(CHOOSERS, self._shell.state.topology.slots))) if undecided else set()

    @property
    def _first(self) -> bool:
        """Whether this is the lowest connected slot."""
        shell = self._shell
        return min([shell.config.slot, *shell.network.links]) == shell.config.slot

    def _gather(self, now: float) -> None:
        """Connect to all slots if it may fall to this agent to choose, because there is no lower one or it is late."""
        if not self._gathers and ((self._first and now > self._began + GATHER_AFTER_S) or now > self._deadline):
            self._gathers = True
            self._shell.connect_peers(everyone=True)

    def inventory(self, inventory: Inventory) -> None:
        if inventory.epoch == self._epoch:
            self._inventories[inventory.slot] = inventory
            self._choose(self._shell.clock())

    def tick(self, now: float) -> None:
        shell = self._shell
        # Each epoch is settled before the next, even by an agent that the choice left out and that stays RECOVERING.
        settled = shell.state.mode is not Mode.RECOVERING or self._decision is not None
        if self._wanted and settled and self._newest_is_known(now):
            self.begin(max(shell.state.epoch, shell.shared.newest_epoch) + 1)
        if not self._epoch or self._read or now < self._next_look:
            return
        self._next_look = now + SETTLE_POLL_INTERVAL_S
        shell.shared.choice(self._epoch, self._arrived)
        if self._decision is None:
            self._gather(now)
            self._choose(now)

    def _newest_is_known(self, now: float) -> bool:
        """Return whether the newest epoch has been read since one was requested, or was waited for long enough."""
        return self._shell.shared.looked_at >= self._wanted_at or now > self._wanted_at + FOLDER_PATIENCE_S

    def _choose(self, now: float) -> None:
        """Choose if this is the lowest connected slot. Other slots choose once it has been silent past the deadline."""
        shell, first = self._shell, self._first
        late = now > self._deadline + (0.0 if first else shell.config.inventory_deadline)
        if self._decision is not None or not self._ready or not (first or late):
            return
        topology = shell.state.topology
        if self._unheard(now):
            return
        expected = range(topology.slots)
        answer = restore_choice.choose(self._inventories, topology.groups, expected, now > self._deadline)
        if isinstance(answer, restore_choice.Wait):
            self._say_whom(answer)
            return
        snapshot = answer.snapshot if isinstance(answer, restore_choice.Choice) else None
        reason = answer.reason[:REASON_LIMIT] if isinstance(answer, restore_choice.FallBack) else ""
        incarnations = tuple(
            self._inventories[slot].incarnation if slot in self._inventories else 0 for slot in range(topology.slots)
        )
        present = [slot for slot, incarnation in enumerate(incarnations) if incarnation]
        orders = (
            restore_choice.plan(self._inventories, topology.groups, snapshot, self._epoch, present) if snapshot else ()
        )
        decision = Decision(epoch=self._epoch, snapshot=snapshot, incarnations=incarnations, reason=reason)
        choice, then = Choice(decision=decision, orders=orders), functools.partial(self._chosen, self._epoch)
        if not shell.shared.choose(choice, then) and now > self._deadline + WARNING_INTERVAL_S:
            self._warn_unwritten(now)

    def _chosen(self, epoch: int, choice: Choice | None) -> None:
        """Tell the choice that stands. None: the folder does not take it; the epoch stays open, a tick tries again."""
        shell = self._shell
        if epoch != self._epoch or self._read:
            return
        if choice is None:
            self._warn_unwritten(shell.clock())
            return
        if choice.decision.snapshot is None:
            reason = choice.decision.reason
            shell.journal.write("info", "nothing in memory is restored", epoch=epoch, reason=reason)
        for link in shell.network.links.values():
            link.send(choice.decision)
        self._decided(choice)

    def _warn_unwritten(self, now: float) -> None:
        """Say from time to time that the choice cannot be written."""
        if now >= self._next_warning:
            self._next_warning = now + WARNING_INTERVAL_S
            reason = self._shell.shared.failure
            self._shell.journal.write("warning", "the choice cannot be written", epoch=self._epoch, reason=reason)

    def _say_whom(self, wait: restore_choice.Wait) -> None:
        """Log, once for the same agents, that only they can end the wait."""
        if wait.too_few and wait.slots != self._waits_for:
            self._waits_for = wait.slots
            reason = "too few have answered to give up what they hold"
            self._shell.journal.write("warning", "waiting for agents", slots=wait.slots, reason=reason)

    def _unheard(self, now: float) -> bool:
        """Return whether agents that should answer immediately have not answered yet."""
        shared, links = self._shell.shared, self._shell.network.links
        missing = set(range(self._shell.state.topology.slots)) - self._inventories.keys()
        if now < self._patience(CONNECTED_GRACE) and missing & links.keys():
            return True
        return now < self._patience(KNOWN_GRACE) and any(shared.may_have(slot) for slot in missing)

    def _patience(self, grace: float) -> float:
        """Return the time until which to wait for an answer that could not change the choice."""
        return self._verified_at + (self._verified_at - self._began) + grace

    def _decided(self, choice: Choice) -> None:
        """Apply a choice that has been read: put it in force where possible and follow its orders."""
        shell, self._decision, self._read, self.choice = self._shell, choice.decision, True, choice
        shell.shared.learn(choice.decision.epoch, choice.decision.reason)
        shell.dispatch(events.PlanRead(choice.decision, choice.orders))
        shell.connect_peers(everyone=False)
        waiting, self._put_off = self._put_off, []
        for sender, incarnation, message in waiting:
            shell.route(sender, incarnation, message)

    def heard(self, message: Any) -> None:
        """End the election here on a decision from a peer. Its orders are read from the shared folder."""
        if not isinstance(message, Decision) or message.epoch != self._epoch:
            return
        if self._decision is None:
            self._decision = message
            self._shell.connect_peers(everyone=False)
        self.catch_up(message.epoch)

    def _incarnation(self, slot: int) -> int:
        link = self._shell.network.links.get(slot)
        return link.theirs.incarnation if link is not None and link.theirs is not None else 0
