"""Links to the agents of other slots: which ones to keep open, and which part of this agent handles each message.

Ranks of another layout that have none of this layout's agents on their node read over such links, too. They may ask for
bytes of what was decided, and for nothing else.
"""

from keepwarm.ft.agent.inbox import Inbox, strand
from keepwarm.ft.agent.recovery_election import RecoveryElection
from keepwarm.ft.agent.remote_reads import Reads
from keepwarm.ft.agent.repair import Repair
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import READ_STRIPE, Bucket, Part, Read, Wire
from keepwarm.ft.transport.link import Link
from keepwarm.ft.transport.network import NOT_NEEDED, READER

REFUSALS_INTERVAL_S = 10.0
"""Time between two log lines on refused connections, in seconds: strangers must not fill the disk."""


class PeerLinks:
    """Handler of the links to other agents."""

    def __init__(self, shell: Shell, inbox: Inbox, repair: Repair, reads: Reads, election: RecoveryElection) -> None:
        self._shell, self._inbox, self._repair, self._reads, self._election = shell, inbox, repair, reads, election
        self._missing: dict[int, float] = {}
        self._refusals = 0
        self._refusals_from = 0.0
        """From when on the next refused connection is logged."""

    @property
    def _near(self) -> set[int]:
        """Return the group members and tree neighbours, all of which are required for a commit."""
        return {*self._shell.state.group.members, *self._shell.state.topology.neighbours(self._shell.config.slot)}

    def connect(self, *, everyone: bool) -> None:
        """Connect to the slots that commits, repairs, reads and elections need, or to all slots with `everyone`.

        The links that an epoch needed are closed once they have been idle for a while.
        """
        electing = self._election.awaited
        needed = self._near | self._reads.awaited | self._repair.awaited | electing
        slots = range(self._shell.state.topology.slots) if everyone else needed
        self._shell.network.set_peers(slots, needed)
        self._shell.shared.look(
            set(slots) - self._shell.network.links.keys() - {self._shell.config.slot}, again=bool(electing)
        )

    def tick(self, now: float) -> None:
        """Report to the protocol slots that commits need and that have been away for too long."""
        missing = self._near - self._shell.network.links.keys() - {self._shell.config.slot}
        self._missing = {slot: self._missing.get(slot, now) for slot in missing}
        for slot, since in self._missing.items():
            if now - since > self._shell.config.silence and slot not in self._shell.state.away:
                self._shell.dispatch(events.PeerAway(slot))

    # ---- Handler

    def connected(self, link: Link) -> None:
        if _is_reader(link):
            self._shell.network.admitted(link)
            if link.dialled:
                link.close("it is no agent")
            return
        self._shell.network.opened(link)
        if not link.closed and link.theirs is not None:
            self._shell.journal.write("info", "connected", peer=link.slot)
            self._shell.dispatch(events.PeerConnected(link.slot, link.theirs.incarnation))
            self._election.connected(link.slot)
            self._repair.connected(link.slot)
            self._reads.connected(link.slot)

    def lost(self, link: Link, reason: str) -> None:
        slot = link.theirs.slot if link.theirs is not None else -1
        self._shell.outbox.forget(link)
        self._inbox.forget(link)
        self._shell.network.forget(link)
        if _is_reader(link):
            return
        level = "info" if reason == NOT_NEEDED else "warning"
        self._shell.journal.write(level, "lost a peer", peer=slot, reason=reason)
        if slot not in self._shell.network.links:
            self._shell.dispatch(events.PeerLost(slot))
            self._election.lost(slot)

    def refused(self, link: Link, reason: str) -> None:
        self._shell.outbox.forget(link)
        self._inbox.forget(link)
        self._shell.network.forget(link)
        if link.dialled:
            return
        self._refusals += 1
        now = self._shell.clock()
        if now >= self._refusals_from:
            count, self._refusals, self._refusals_from = self._refusals, 0, now + REFUSALS_INTERVAL_S
            self._shell.journal.write("warning", "refused a connection", peer=link.label, reason=reason, count=count)

    def target(self, link: Link, message: Wire, size: int) -> memoryview | None:
        if _is_reader(link):
            return None
        if isinstance(message, Part):
            if message.stripe == READ_STRIPE:
                return self._reads.target(message, size)
            self._election.catch_up(message.epoch, link.slot)
            return self._repair.target(message, size)
        return self._inbox.target(link, size) if isinstance(message, Bucket) else None

    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None:
        assert link.theirs is not None
        if _is_reader(link):
            self._read(link, message)
            return
        sender, incarnation = link.slot, link.theirs.incarnation
        if isinstance(message, Bucket) and payload is not None:
            self._inbox.received(link, message, payload)
        elif isinstance(message, Part):
            (self._reads if message.stripe == READ_STRIPE else self._repair).part(message, payload)
        elif self._shell.pool.busy(strand(link)):
            self._shell.pool.order(
                strand(link), lambda: None, lambda _: self._shell.route(sender, incarnation, message)
            )
        else:
            self._shell.route(sender, incarnation, message)

    def drained(self, link: Link) -> None:
        self._shell.outbox.drained(link)

    def _read(self, link: Link, message: Wire) -> None:
        """Serve a reader as a rank of this node is; one that says anything else is done."""
        if isinstance(message, Read) and message.owner < self._shell.state.topology.slots:
            self._reads.for_worker(link, message)
        else:
            link.close("a reader only reads what agents of this layout hold")


def _is_reader(link: Link) -> bool:
    return link.theirs is not None and link.theirs.role == READER
