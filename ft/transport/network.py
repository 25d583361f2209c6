"""Links to the agents of other slots: one connection per peer, redialled when it breaks.

All share one selector with its owner: every registered object has `ready(mask)`, and `Network.tick(now)` handles
timeouts.
"""

import contextlib
import selectors
import socket
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import msgspec

from keepwarm.ft.protocol.messages import decode_agent
from keepwarm.ft.transport.bandwidth import TokenBucket
from keepwarm.ft.transport.channel import Channel
from keepwarm.ft.transport.link import Credentials, FarEnd, Handler, Link, LinkLimits


class Peer(msgspec.Struct):
    """A slot to stay connected to, and when to retry."""

    slot: int
    retry_at: float = 0.0
    delay: float = 0.05
    link: Link | None = None
    dialled: tuple[str, int] | None = None
    """The address dialled for `link`, if this side dialled it."""
    needed: float | None = None
    """Since when the link has been needed without an alternative."""


@dataclass(frozen=True, kw_only=True)
class NetworkLimits:
    """Maximum payload bytes, total send rate in bytes per second (None: no cap), and peer timeout in seconds."""

    payload: int
    rate: float | None = None
    silence: float = 5.0


class Network:
    """Links to the agents of other slots. Of two agents, the one with the lower slot dials and redials.

    The higher one also dials, a little later, if the link is `needed`: the lower one may not want it.
    """

    ROLES = frozenset({"agent"})
    PATIENCE = 0.5
    """Seconds the higher slot waits for the lower one to dial."""

    def __init__(
        self, selector: selectors.BaseSelector, handler: Handler, credentials: Credentials, *, bind: tuple[str, int],
        resolve: Callable[[int], tuple[str, int] | None], limits: NetworkLimits,
    ) -> None:  # fmt: skip
        """Listen on `bind` (port 0: any). `resolve(slot)` returns a peer's address, if known."""
        self._selector, self._handler, self._credentials, self._resolve = selector, handler, credentials, resolve
        self.slot, self._payload_limit = credentials.hello.slot, limits.payload
        self._limits = LinkLimits(cap=TokenBucket(limits.rate), silence=limits.silence)
        self._peers: dict[int, Peer] = {}
        self._links: set[Link] = set()
        family = socket.getaddrinfo(*bind, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server(bind, family=family, backlog=128)
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return host, port

    @property
    def links(self) -> dict[int, Link]:
        """Open links by slot."""
        return {slot: peer.link for slot, peer in self._peers.items() if peer.link is not None and peer.link.open}

    def set_peers(self, slots: Iterable[int], needed: Collection[int] = ()) -> None:
        """Set the slots to stay connected to, those in `needed` from either side. Links to other slots are closed."""
        wanted = set(slots) - {self.slot}
        for slot in wanted - self._peers.keys():
            self._peers[slot] = Peer(slot)
        for slot in self._peers.keys() - wanted:
            link = self._peers.pop(slot).link
            if link is not None:
                link.close("not a peer any more")
        now = time.monotonic()
        for slot, peer in self._peers.items():
            peer.needed = (peer.needed or now) if slot in needed else None

    def ready(self, mask: int) -> None:
        """Accept a waiting connection."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, address = self._listener.accept()
            self._add(connection, f"{address[0]}:{address[1]}", dialled=False)

    def tick(self, now: float) -> None:
        for link in list(self._links):
            link.tick(now)
        for peer in self._peers.values():
            self._give_up_former(peer)
            idle = peer.link is None or peer.link.closed
            mine = peer.slot > self.slot or (peer.needed is not None and now > peer.needed + self.PATIENCE)
            if mine and idle and now >= peer.retry_at:
                peer.retry_at, peer.delay = now + peer.delay, min(1.0, peer.delay * 2)
                self._dial(peer)

    def opened(self, link: Link) -> None:
        """Register an open link. The handler must call this for each one; the newest link of a slot replaces others."""
        peer = self._peers.setdefault(link.slot, Peer(link.slot))
        old = peer.link
        if old is not None and old.open and old is not link and _incarnation(link) < _incarnation(old):
            link.close("a later incarnation of this slot is connected")
            return
        peer.link, peer.delay, peer.dialled = link, 0.05, None
        if old is not None and old is not link:
            old.close("replaced by a newer connection")

    def forget(self, link: Link) -> None:
        """Remove a closed link. The handler must call this for each one."""
        self._links.discard(link)

    def close(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        for link in list(self._links):
            link.close("this agent is leaving")

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
        with contextlib.suppress(OSError):
            family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
            connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.connect(address)
            label = f"slot {peer.slot} at {address[0]}:{address[1]}"
            peer.link = self._add(connection, label, dialled=True, expected=peer.slot)
            peer.dialled = address

    def _add(self, connection: socket.socket, label: str, *, dialled: bool, expected: int | None = None) -> Link:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far = FarEnd(label=label, dialled=dialled, expected=expected)
        channel = Channel(connection, decode_agent, self._payload_limit)
        link = Link(channel, self._selector, self._handler, self._credentials, far, self._limits)
        self._links.add(link)
        return link


def _incarnation(link: Link) -> int:
    return link.theirs.incarnation if link.theirs is not None else -1
