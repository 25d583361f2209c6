"""Agree on the snapshot to restore. Agents send inventories to the lowest live slot, which proposes a choice.

The choice for which enough slots have voted (`keepwarm.ft.protocol.ballot`) stands, with its decoding plan, and is told
along the links; what peers ask meanwhile is put off. No file is needed for it. Where too few are connected, the first
choice that is written to the folder stands. So it is written there before anyone is asked to vote, if the folder
answers, and if it has another one, that one stands. Should the folder have answered only one side of a cut, two choices
of one epoch may be followed for a while: an agent that hears of both asks for the next epoch.

Agents tell of an epoch along their usual links and connect to the lowest slots, which connect to all. Another agent
connects to all only if it knows of no lower one. So an epoch takes a few links for each agent, never one for each pair.
"""

import functools
import math
import time

import msgspec

from keepwarm.ft.agent.scrubber import verify_all
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.discovery.registry import REASON_LIMIT
from keepwarm.ft.errors import TransportError
from keepwarm.ft.protocol import events, restore_choice
from keepwarm.ft.protocol.ballot import Ballot, Promises
from keepwarm.ft.protocol.messages import (
    Choice,
    Chosen,
    Decision,
    Decode,
    Fetch,
    Inventory,
    InventoryRequest,
    Proposal,
    Read,
    Vote,
    Wire,
    encode,
)
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
ASK_AGAIN_S = 1.0
"""Interval at which an agent that does not know the choice of an epoch asks those that it is connected with."""
VOTES_PATIENCE_S = 10.0
"""How long votes of a connected majority may fail to agree before another epoch begins. They do if a slot that had
asked for them has died with its proposal."""
CLAIM_PATIENCE_S = 2.0
"""How long the folder has to take a choice before votes are asked for without it, in seconds."""
KNOWN_GRACE = 0.5
"""As `CONNECTED_GRACE`, for an agent that has published its endpoint but is not connected (yet)."""


class RecoveryElection:
    """Runs one epoch at a time: request inventories, collect them, choose, announce."""

    def __init__(self, shell: Shell, promises: Promises) -> None:
        """`promises` are those that the memory tells of."""
        self._shell = shell
        self._ballot = Ballot(shell.config.slot, shell.state.topology.slots, shell.state.incarnation, promises)
        self._proposed_at = self._next_ask = 0.0
        self._claim: Choice | None = None
        """What the folder has been asked to hold before it is proposed."""
        self._claimed_at = 0.0
        self._folder_answers = True
        """Whether it has answered since it was last waited for in vain."""
        self._split = False
        """Whether no choice can get a majority of the votes any more."""
        self._too_long = False
        """Whether the proposal does not fit into a frame, and the folder decides."""
        self._asked_of: dict[int, float] = {}
        """When each slot was last asked for the choice that it acts on."""
        self.decided_at = 0.0
        """When the newest choice became known here, in seconds since 1970."""
        self._epoch = 0
        self._asked: set[int] = set()
        self._inventories: dict[int, Inventory] = {}
        self._began = self._verified_at = self._deadline = 0.0
        self._next_look = self._next_warning = 0.0
        self._decision: Decision | None = None
        self._read = False
        """Whether the choice of the current epoch is known whole. The decision may be known earlier."""
        self.choice: Choice | None = None
        """The newest choice that is known whole."""
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
        self._ballot.begin(epoch, new=not shell.state.decided_epoch)
        self._split, self._too_long, self._claim = False, False, None
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
            self._next_ask = self._verified_at + ASK_AGAIN_S
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
        link = self._shell.network.links.get(sender)
        if link is not None and self._read:
            link.send(self._announcement())
        if self._ready:
            self._shell.dispatch(events.Received(sender, self._incarnation(sender), request))
        else:
            self._asked.add(sender)

    def connected(self, slot: int) -> None:
        link = self._shell.network.links.get(slot)
        if link is None or not self._epoch:
            return
        if self._decision is not None:
            link.send(self._announcement())
            return
        link.send(InventoryRequest(epoch=self._epoch))
        proposal = self._ballot.proposal
        if proposal is not None:
            link.send(Proposal(choice=proposal))

    def lost(self, slot: int) -> None:
        """Discard a lost agent's inventory: it may come back with empty memory, or not at all."""
        if self._decision is None:
            self._inventories.pop(slot, None)

    def catch_up(self, epoch: int, sender: int) -> bool:
        """Find out the choice of an epoch if a peer acts on it and it is not known whole. Return whether so."""
        shell, now = self._shell, self._shell.clock()
        if epoch < shell.state.epoch or (epoch == self._epoch and self._read):
            return False
        shell.shared.choice(epoch, self._arrived)
        link = shell.network.links.get(sender)
        if link is not None and now - self._asked_of.get(sender, -math.inf) >= SETTLE_POLL_INTERVAL_S:
            self._asked_of[sender] = now
            link.send(InventoryRequest(epoch=epoch))
        return True

    def put_off(self, sender: int, incarnation: int, message: Decode | Fetch | Read) -> None:
        """Keep a peer's request until the choice that it follows is known. If there are many, it asks again."""
        if len(self._put_off) < PUT_OFF_LIMIT:
            self._put_off.append((sender, incarnation, message))

    def _arrived(self, choice: Choice | None) -> None:
        """Follow a choice that stands, unless that has been done. None: the folder has none."""
        self._folder_answers = True
        if choice is None:
            return
        epoch = choice.decision.epoch
        if epoch != self._epoch:
            self.begin(epoch)
        if epoch == self._epoch and not self._read:
            self._decided(choice)
        elif epoch == self._epoch and not _same(choice, self.choice):
            self.request(f"epoch {epoch} has two choices: the folder or a majority was out of reach for one side")

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
        settled = shell.state.mode is not Mode.RECOVERING or self._decision is not None or self._split
        if self._wanted and settled and self._newest_is_known(now):
            self.begin(max(shell.state.epoch, shell.shared.newest_epoch) + 1)
        if not self._epoch or self._read or now < self._next_look:
            return
        self._next_look = now + SETTLE_POLL_INTERVAL_S
        shell.shared.choice(self._epoch, self._arrived)
        self._ask_again(now)
        if self._decision is None:
            self._gather(now)
            self._choose(now)

    def _ask_again(self, now: float) -> None:
        """Ask the connected slots once more: one of them may know the choice."""
        if self._ready and now >= self._next_ask:
            self._next_ask = now + ASK_AGAIN_S
            for link in self._shell.network.links.values():
                link.send(InventoryRequest(epoch=self._epoch))

    def _newest_is_known(self, now: float) -> bool:
        """Return whether the newest epoch has been read since one was requested, or was waited for long enough."""
        return self._shell.shared.looked_at >= self._wanted_at or now > self._wanted_at + FOLDER_PATIENCE_S

    def _choose(self, now: float) -> None:
        """Choose if this is the lowest connected slot. Other slots choose once it has been silent past the deadline."""
        shell, first = self._shell, self._first
        late = now > self._deadline + (0.0 if first else shell.config.inventory_deadline)
        if self._decision is not None or not self._ready or not (first or late):
            return
        if self._ballot.proposal is not None:
            self._settle(self._ballot.proposal, now)
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
        self._settle(Choice(decision=decision, orders=orders), now)

    # ---- making a choice stand

    def _settle(self, choice: Choice, now: float) -> None:
        """Have a choice stand by votes, or by the folder where those that are connected are too few for that."""
        shell, connected = self._shell, {self._shell.config.slot, *self._shell.network.links}
        if len(connected) < self._ballot.majority or self._too_long or self._ballot.too_few(connected):
            then = functools.partial(self._chosen, self._epoch)
            if not shell.shared.choose(choice, then) and now > self._deadline + WARNING_INTERVAL_S:
                self._warn_unwritten(now)
        elif self._ballot.proposal is None:
            self._claim_first(choice, now)
        elif not self._split and (self._ballot.hopeless(connected) or now > self._proposed_at + VOTES_PATIENCE_S):
            self._split = True
            self.request(f"the votes of epoch {self._epoch} agree on no choice")

    def _claim_first(self, choice: Choice, now: float) -> None:
        """Propose a choice once the folder has it, or has not answered for a while."""
        if self._claim is None:
            reason = self._whole_reason(choice.decision)
            decision = msgspec.structs.replace(choice.decision, reason=reason)
            self._claim, self._claimed_at = msgspec.structs.replace(choice, decision=decision), now
            self._shell.shared.choose(self._claim, functools.partial(self._claimed, self._epoch))
        if not self._folder_answers or now > self._claimed_at + CLAIM_PATIENCE_S:
            self._folder_answers = False
            self._propose(self._claim, now)

    def _claimed(self, epoch: int, held: Choice | None) -> None:
        """Propose what the folder holds if that was written here. None: it takes nothing."""
        self._folder_answers = True
        if epoch != self._epoch or self._read or self._claim is None:
            return
        if held is not None and not _same(held, self._claim):
            self._chosen(epoch, held)
        elif self._ballot.proposal is None:
            self._propose(held or self._claim, self._shell.clock())

    def _propose(self, choice: Choice, now: float) -> None:
        shell, self._proposed_at = self._shell, now
        proposal = Proposal(choice=self._ballot.propose(choice))
        try:
            encode(proposal)
        except TransportError as error:
            self._too_long = True
            shell.journal.write("warning", "a choice is too long to be voted on", reason=str(error))
            return
        for link in shell.network.links.values():
            link.send(proposal)
        self.asked_for_vote(shell.config.slot, proposal)

    def _whole_reason(self, decision: Decision) -> str:
        """Return the reason, with that of the last epoch if that restored nothing and so discarded what was left."""
        reason, before = decision.reason, self.choice.decision if self.choice is not None else None
        if not reason.startswith(restore_choice.NOTHING_HELD) or before is None or before.snapshot is not None:
            return reason
        if before.reason.startswith(restore_choice.NOTHING_HELD):
            return before.reason
        return f"{reason}; in epoch {before.epoch}: {before.reason}"[:REASON_LIMIT]

    def asked_for_vote(self, sender: int, proposal: Proposal) -> None:
        """Vote, and tell the one that asks."""
        shell, choice = self._shell, proposal.choice
        if choice.decision.epoch != self._epoch:
            self.begin(choice.decision.epoch)
        if choice.decision.epoch != self._epoch:
            return
        vote = self._ballot.vote(choice)
        shell.promise(self._ballot.promises)
        link = shell.network.links.get(sender)
        if sender == shell.config.slot:
            self.voted(sender, vote)
        elif link is not None:
            link.send(self._announcement() if self._read else vote)

    def voted(self, slot: int, vote: Vote) -> None:
        """Count a vote."""
        choice = self._ballot.count(slot, vote)
        if choice is not None and not self._read:
            self._chosen(self._epoch, choice)
            self._shell.shared.note(choice, self._arrived)

    def told(self, chosen: Chosen) -> None:
        """Follow a choice that a peer knows to stand."""
        self._arrived(chosen.choice)

    def _announcement(self) -> Wire:
        """Return what tells a peer of the choice of this epoch."""
        assert self._decision is not None
        if not self._read or self.choice is None:
            return self._decision
        chosen = Chosen(choice=self.choice)
        try:
            encode(chosen)
        except TransportError:  # it is read from the folder
            return self._decision
        return chosen

    def _chosen(self, epoch: int, choice: Choice | None) -> None:
        """Tell the choice that stands. None: the folder does not take it; the epoch stays open, a tick tries again."""
        shell, self._folder_answers = self._shell, True
        if epoch != self._epoch or self._read:
            return
        if choice is None:
            self._warn_unwritten(shell.clock())
            return
        if choice.decision.snapshot is None:
            reason = choice.decision.reason
            shell.journal.write("info", "nothing in memory is restored", epoch=epoch, reason=reason)
        self._decided(choice)
        announcement = self._announcement()
        for link in shell.network.links.values():
            link.send(announcement)

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
        """Apply a choice that stands: put it in force where possible and follow its orders."""
        shell, self._decision, self._read, self.choice = self._shell, choice.decision, True, choice
        self._ballot.follow(choice)
        shell.promise(self._ballot.promises)
        self.decided_at = time.time()
        shell.shared.learn(choice.decision.epoch, choice.decision.reason)
        shell.dispatch(events.PlanRead(choice.decision, choice.orders))
        shell.connect_peers(everyone=False)
        waiting, self._put_off = self._put_off, []
        for sender, incarnation, message in waiting:
            shell.route(sender, incarnation, message)

    def heard(self, sender: int, message: Decision) -> None:
        """End the election here on a decision from a peer. Its orders are read from the shared folder."""
        if message.epoch != self._epoch:
            return
        if self._decision is None:
            self._decision = message
            self._shell.connect_peers(everyone=False)
        self.catch_up(message.epoch, sender)

    def _incarnation(self, slot: int) -> int:
        link = self._shell.network.links.get(slot)
        return link.theirs.incarnation if link is not None and link.theirs is not None else 0


def _same(one: Choice, other: Choice | None) -> bool:
    """Return whether two choices restore the same from the same agents. The folder may have added to the reason."""
    if other is None:
        return False
    decision = msgspec.structs.replace(one.decision, reason=other.decision.reason)
    return msgspec.structs.replace(one, decision=decision) == other
