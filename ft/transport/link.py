"""Connection between two processes that know the job's secret: handshake, deadlines, bandwidth cap.

Until the link is open, only the two handshake frames (`keepwarm.ft.transport.auth`) are read, at most 512 bytes each,
and nothing else is even decoded. Over the network, every later frame carries a MAC (`keepwarm.ft.transport.session`).
The owner of the selector must call `tick(now)` regularly to enforce deadlines.
"""

import selectors
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from keepwarm.ft.errors import AuthenticationFailed, PeerLost, TransportError
from keepwarm.ft.protocol.messages import MESSAGE_LIMIT, Hello, Proof, Wire
from keepwarm.ft.transport import auth
from keepwarm.ft.transport.bandwidth import TURN, TokenBucket
from keepwarm.ft.transport.channel import Channel, decoder_of

HANDSHAKE_LIMIT = 512
"""Maximum frame size in bytes until the other side has proved that it knows the secret."""
HANDSHAKE_DEADLINE = 5.0
_handshake = decoder_of(Hello | Proof)


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Identity of this side of a link, the secret that proves it, and the roles allowed on the other side."""

    hello: Hello
    """The nonce is ignored: every link draws its own."""
    secret: bytes
    roles: frozenset[str]

    def fresh(self) -> Hello:
        return msgspec.structs.replace(self.hello, nonce=auth.nonce())


@dataclass(frozen=True, kw_only=True)
class FarEnd:
    """The other side of a link before it has identified itself. `expected` is the slot that must answer."""

    label: str
    dialled: bool
    expected: int | None = None


@dataclass(frozen=True, kw_only=True)
class LinkLimits:
    """Bandwidth shared by links, seconds without a byte after which a link is lost (None: never), and whether payloads
    have a MAC too.
    """

    cap: TokenBucket = field(default_factory=lambda: TokenBucket(None))
    silence: float | None = None
    authenticate_payloads: bool = False


class Handler(Protocol):
    """Receives link events. Called from the thread that drives the selector."""

    def connected(self, link: "Link") -> None:
        """Handle a link whose other side has proved its knowledge of the secret. `link.theirs` identifies it."""
        ...

    def lost(self, link: "Link", reason: str) -> None:
        """Handle the loss of an open link. Called once."""
        ...

    def refused(self, link: "Link", reason: str) -> None:
        """Handle a link that failed before it opened."""
        ...

    def target(self, link: "Link", message: Wire, size: int) -> memoryview | None:
        """Return memory of exactly `size` bytes for the payload of `message`, or None to drop it."""
        ...

    def received(self, link: "Link", message: Wire, payload: memoryview | None) -> None: ...

    def drained(self, link: "Link") -> None:
        """Handle a link with little left to send, which can take more bulk data."""
        ...


class Link:
    """One connection, from the first byte of its handshake to its end."""

    LOW_WATER = 1 << 20

    def __init__(
        self, channel: Channel, selector: selectors.BaseSelector, handler: Handler, credentials: Credentials,
        far: FarEnd, limits: LinkLimits | None = None,
    ) -> None:  # fmt: skip
        """Take ownership of `channel` and start the handshake."""
        limits = limits or LinkLimits()
        self.channel, self.mine, self._credentials = channel, credentials.fresh(), credentials
        self.dialled, self.label, self._expected = far.dialled, far.label, far.expected
        self.theirs: Hello | None = None
        self.open = self.closed = False
        self._pauses = 0
        self.reason = ""
        self._selector, self._handler = selector, handler
        self._cap, self._silence = limits.cap, limits.silence
        self._authenticate_payloads = limits.authenticate_payloads
        self._began = self._heard = self._spoke = self.used = time.monotonic()
        self._connecting = far.dialled
        self._mask = 0
        channel.message_limit = HANDSHAKE_LIMIT
        channel.payload_limit, self._payload_limit = 0, channel.payload_limit
        channel.decode, self._decode = _handshake, channel.decode
        channel.send(self.mine)
        self._watch(throttled=False)

    @property
    def slot(self) -> int:
        """Authenticated slot of the other side, -1 before authentication."""
        return self.theirs.slot if self.theirs is not None and self.open else -1

    def send(
        self,
        message: Wire | None,
        payload: memoryview | None = None,
        done: Callable[[], None] | None = None,
        descriptors: Iterable[int] = (),
    ) -> None:
        """Send as `Channel.send` does. On a closed link send nothing and call `done` immediately."""
        if self.closed:
            if done is not None:
                done()
            return
        self.used = time.monotonic()
        self.channel.send(message, payload, done, descriptors)
        self._watch(throttled=self._throttled)

    def post(self, message: Wire) -> None:
        """Send a message without payload, as much of it as the socket takes at once; nothing on a closed link."""
        if self.closed:
            return
        self.used = time.monotonic()
        self.channel.send(message)
        try:
            self._write()
        except TransportError as error:
            self.close(str(error))

    def ready(self, mask: int) -> None:
        """Handle a socket that the selector reports as ready. An error of the transport closes this link alone."""
        if self.closed:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                self._write()
            if mask & selectors.EVENT_READ and not self.closed:
                for message, payload in self.channel.read(self._target):
                    self._heard = time.monotonic()
                    if message is not None:
                        self.used = self._heard
                        self._take(message, payload)
                    if self.closed or self._pauses:
                        return
                self._heard = time.monotonic()
        except TransportError as error:
            self.close(str(error))

    def tick(self, now: float) -> None:
        """Enforce deadlines and throttling. Must be called a few times a second."""
        if self.closed:
            return
        try:
            if not self.open and now - self._began > HANDSHAKE_DEADLINE:
                raise PeerLost(f"no handshake within {HANDSHAKE_DEADLINE:g} s")
            if self.open and self._silence is not None:
                if self.paused:
                    self._heard = now
                if now - self._heard > self._silence:
                    raise PeerLost(f"waited {self._silence:g} s for a sign of life")
                if now - max(self._spoke, self._began) > self._silence / 3 and not self.channel.pending:
                    self.channel.send(None)
                    self._spoke = now
            self._watch(throttled=self._cap.rate is not None and self._cap.available() < min(65536, self._cap.burst))
        except TransportError as error:
            self.close(str(error))

    @property
    def paused(self) -> bool:
        return self._pauses > 0

    def pause(self) -> None:
        """Stop reading until `resume`, which every part that paused calls. Backpressure makes the other side wait."""
        self._pauses += 1
        self._watch(throttled=self._throttled)

    def resume(self) -> None:
        self._pauses -= 1
        if not self.paused and not self.closed:
            self._watch(throttled=self._throttled)
            # Data already in the buffer does not make the socket readable.
            self.ready(selectors.EVENT_READ)

    def close(self, reason: str) -> None:
        """Close the link and notify the handler. Further calls have no effect."""
        if self.closed:
            return
        self.closed, self.reason = True, reason
        if self._mask:
            self._selector.unregister(self.channel.socket)
            self._mask = 0
        was_open, self.open = self.open, False
        self.channel.close()
        (self._handler.lost if was_open else self._handler.refused)(self, reason)

    def _target(self, message: Wire, size: int) -> memoryview | None:
        return self._handler.target(self, message, size)

    def _take(self, message: Wire, payload: memoryview | None) -> None:
        if self.open:
            self._handler.received(self, message, payload)
        elif isinstance(message, Hello) and self.theirs is None:
            auth.check_hello(self.mine, message, self._credentials.roles)
            if self._expected not in (None, message.slot):
                raise AuthenticationFailed(f"slot {self._expected} was expected, slot {message.slot} answered")
            self.theirs = message
            self.channel.send(auth.proof(self._credentials.secret, self.mine, message, dialled=self.dialled))
            self._watch(throttled=False)
        elif isinstance(message, Proof) and self.theirs is not None:
            auth.check_proof(self._credentials.secret, self.mine, self.theirs, message, dialled=self.dialled)
            self._trust(self.theirs)
        else:
            raise AuthenticationFailed(f"{type(message).__name__} in the middle of the handshake")

    def _trust(self, theirs: Hello) -> None:
        """Open the link. Nothing can come between the ends of a Unix socket, so its frames need no MAC."""
        channel = self.channel
        if channel.socket.family != socket.AF_UNIX:
            keys = auth.session_keys(self._credentials.secret, self.mine, theirs, dialled=self.dialled)
            channel.authenticate(keys, payloads=self._authenticate_payloads)
        channel.decode = self._decode
        channel.trust(MESSAGE_LIMIT, self._payload_limit)
        self.open = True
        self._handler.connected(self)

    def _write(self) -> None:
        if self._connecting:
            error = self.channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise PeerLost(f"cannot be reached: error {error}")
            self._connecting = False
        budget = self._cap.available() if self.open else TURN
        count = self.channel.write(budget) if budget else 0
        if count:
            self._cap.take(count)
            self._spoke = time.monotonic()
        if self.open and self.channel.pending < self.LOW_WATER:
            self._handler.drained(self)
        self._watch(throttled=self.open and self._cap.available() == 0)

    _throttled = False

    def _watch(self, *, throttled: bool) -> None:
        if self.closed:
            return
        self._throttled = throttled
        mask = 0 if self.paused else selectors.EVENT_READ
        if self._connecting or (self.channel.pending and not throttled):
            mask |= selectors.EVENT_WRITE
        if mask == self._mask:
            return
        if not mask:
            self._selector.unregister(self.channel.socket)
        else:
            (self._selector.modify if self._mask else self._selector.register)(self.channel.socket, mask, self)
        self._mask = mask
