"""Links to the agents of other slots: one connection per peer, redialled when it breaks.

All share one selector with its owner: every registered object has `ready(mask)`, and `Network.tick(now)` handles
timeouts.
"""

import contextlib
import selectors
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from keepwarm.ft.protocol.messages import decode_agent
from keepwarm.ft.transport.bandwidth import TokenBucket
from keepwarm.ft.transport.channel import Channel
from keepwarm.ft.transport.link import Credentials, FarEnd, Handler, Link, LinkLimits
from keepwarm.ft.transport.listener import STRANGERS, Listener, Strangers

READER = "reader"
"""Role of a rank of another layout, which reads what this agent's layout restores and is not part of it."""
NOT_NEEDED = "not needed any more"
"""Reason for which an agent closes a link that neither side uses."""


class Peer(msgspec.Struct):
    """A slot to stay connected to, and when to retry."""

    slot: int
    retry_at: float = 0.0
    delay: float = 0.05
    link: Link | None = None
    dialled: tuple[str, int] | None = None
    """The address dialled for `link`, if this side dialled it."""
    needed: float | None = None
    """Since when the link has been needed without an alternative, and not been open."""
    wanted: bool = True
    """Whether this side redials. If not, the link is closed once it has been idle for a while."""


@dataclass(frozen=True, kw_only=True)
class NetworkLimits:
    """Maximum payload bytes, total send rate in bytes per second (None: no cap), peer timeout in seconds, connections
    that may wait to identify themselves, and whether payloads have a MAC.
    """

    payload: int
    rate: float | None = None
    silence: float = 5.0
    strangers: int = STRANGERS
    authenticate_payloads: bool = False


class Network:
    """Links to the agents of other slots. Of two agents, the one with the lower slot dials and redials.

    The higher one also dials, a little later, if the link is `needed`: the lower one may not want it, or still believe
    in its link to the last agent of the slot, whose node is gone.
    """

    ROLES = frozenset({"agent", READER})
    PATIENCE = 0.5
    """Seconds the higher slot waits for the lower one to dial."""
    LINGER = 5.0
    """Seconds without a message after which a link that this side does not want is closed."""

    def __init__(
        self, selector: selectors.BaseSelector, handler: Handler, credentials: Credentials, *, bind: tuple[str, int],
        resolve: Callable[[int], tuple[str, int] | None], limits: NetworkLimits,
    ) -> None:  # fmt: skip
        """Listen on `bind` (port 0: any). `resolve(slot)` returns a peer's address, if known."""
        self._selector, self._handler, self._credentials, self._resolve = selector, handler, credentials, resolve
        self.slot, self._payload_limit = credentials.hello.slot, limits.payload
        self._limits = LinkLimits(
            cap=TokenBucket(limits.rate), silence=limits.silence, authenticate_payloads=limits.authenticate_payloads
        )
        self._peers: dict[int, Peer] = {}
        self._links: dict[Link, None] = {}
        self._open: Mapping[int, Link] = {}
        self._strangers = Strangers(limits.strangers)
        family = socket.getaddrinfo(*bind, type=socket.SOCK_STREAM)[0][0]
        self._listener = Listener(socket.create_server(bind, family=family, backlog=128), selector, self)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.socket.getsockname()[:2]
        return host, port

    @property
    def links(self) -> Mapping[int, Link]:
        """Open links by slot, as they are now: a later change makes another mapping."""
        return self._open

    def set_peers(self, slots: Iterable[int], needed: Collection[int] = ()) -> None:
        """Set the slots to stay connected to, those in `needed` from either side.

        A link to another slot stays open for as long as either side uses it.
        """
        wanted = set(slots) - {self.slot}
        for slot in wanted - self._peers.keys():
            self._peers[slot] = Peer(slot)
        now = time.monotonic()
        for slot, peer in self._peers.items():
            peer.wanted = slot in wanted
            peer.needed = (peer.needed or now) if slot in needed else None
        self._close_unwanted(now)

    def found(self, slot: int) -> None:
        """Dial a slot at once, if it is to be dialled: its address has become known, or has changed."""
        peer = self._peers.get(slot)
        if peer is not None:
            peer.retry_at, peer.delay = 0.0, 0.05
            if peer.needed is not None:
                peer.needed = time.monotonic()  # if it has just started, it is about to dial

    def ready(self, mask: int) -> None:
        """Accept a waiting connection."""
        shed = self._listener.shed
        accepted = self._listener.accept()
        if accepted is not None:
            connection, address = accepted
            link = self._add(connection, f"{address[0]}:{address[1]}", dialled=False)
            if link is not None:
                self._strangers.add(link, address[0])
        elif self._listener.shed > shed:
            self._strangers.close_oldest()

    def tick(self, now: float) -> None:
        self._listener.tick()
        for link in list(self._links):
            link.tick(now)
        self._close_unwanted(now)
        for peer in self._peers.values():
            if not peer.wanted:
                continue
            self._give_up_former(peer)
            if peer.needed is not None and peer.link is not None and peer.link.open:
                peer.needed = now  # the lower one has its time to dial again whenever the link is lost
            idle = peer.link is None or peer.link.closed
            mine = peer.slot > self.slot or (peer.needed is not None and now > peer.needed + self.PATIENCE)
            if mine and idle and now >= peer.retry_at:
                peer.retry_at, peer.delay = now + peer.delay, min(1.0, peer.delay * 2)
                self._dial(peer)

    def opened(self, link: Link) -> None:
        """Register an open link. The handler must call this for each one; the newest link of a slot replaces others."""
        self._strangers.discard(link)
        peer = self._peers.setdefault(link.slot, Peer(link.slot, wanted=False))
        old = peer.link
        if old is not None and old.open and old is not link and _incarnation(link) < _incarnation(old):
            link.close("a later incarnation of this slot is connected")
            return
        peer.link, peer.delay, peer.dialled = link, 0.05, None
        if peer.needed is not None:
            # If both have dialled at once and closed each other's link, only the lower one dials the next time.
            peer.needed = time.monotonic()
        self._open = {**self._open, link.slot: link}
        if old is not None and old is not link:
            old.close("replaced by a newer connection")

    def admitted(self, link: Link) -> None:
        """Note that the other side of an accepted link has identified itself, and is no agent."""
        self._strangers.discard(link)

    def forget(self, link: Link) -> None:
        """Remove a closed link. The handler must call this for each one."""
        self._links.pop(link, None)
        self._strangers.discard(link)
        if link.theirs is not None and self._open.get(link.theirs.slot) is link:
            self._open = {slot: other for slot, other in self._open.items() if other is not link}

    def close(self) -> None:
        self._listener.close()
        for link in list(self._links):
            link.close("this agent is leaving")

    def _close_unwanted(self, now: float) -> None:
        """Close the links that no part of this agent wants and that neither side has used for a while."""
        for slot, peer in list(self._peers.items()):
            if peer.wanted:
                continue
            link = peer.link
            if link is not None and link.open and now - link.used > self.LINGER:
                link.close(NOT_NEEDED)
            if link is None or not link.open:
                del self._peers[slot]
                if link is not None:
                    link.close(NOT_NEEDED)

    def _give_up_former(self, peer: Peer) -> None:
        """Drop an attempted link to a process that is no longer its slot's agent.

        A frozen agent's kernel still accepts connections, but the agent never says hello, and the slot may have a new
        one.
        """
        link = peer.link
        if link is None or link.open or link.closed or peer.dialled is None:
            return
        if self._resolve(peer.slot) not in (None, peer.dialled):
            peer.retry_at, peer.delay = 0.0, 0.05
            link.close("the slot has another agent")

    def _dial(self, peer: Peer) -> None:
        address = self._resolve(peer.slot)
        if address is None:
            return
        try:
            family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
            connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError:
            return
        try:
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.connect(address)
        except OSError:
            connection.close()
            return
        label = f"slot {peer.slot} at {address[0]}:{address[1]}"
        peer.link = self._add(connection, label, dialled=True, expected=peer.slot)
        peer.dialled = address

    def _add(self, connection: socket.socket, label: str, *, dialled: bool, expected: int | None = None) -> Link | None:
        """Begin the handshake on a connection. Return None if it has already gone."""
        far = FarEnd(label=label, dialled=dialled, expected=expected)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel = Channel(connection, decode_agent, self._payload_limit)
            link = Link(channel, self._selector, self._handler, self._credentials, far, self._limits)
        except OSError:
            connection.close()
            return None
        self._links[link] = None
        return link


def _incarnation(link: Link) -> int:
    return link.theirs.incarnation if link.theirs is not None else -1
