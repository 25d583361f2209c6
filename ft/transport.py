"""Framed messages over non-blocking sockets: one connection per peer, a deadline on every wait, nothing copied twice.

A frame is a big-endian u32 length and that many bytes of msgpack; `Bucket` and `Part` are followed by `size` bytes of
payload, which are received straight into the memory they are meant for. A frame of length 0 says "still here". Before
a connection is open only the two frames of the handshake (`ft.auth`) are read, and of each at most 512 bytes.

A `Channel` knows frames, a `Link` a handshake and deadlines, a `Network` the links to all peers. They share one
selector with whoever drives them: every registered object has `ready(mask)`, and `Network.tick(now)` looks after time.
"""

import array
import collections
import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Protocol, TypeAlias

import msgspec

from ft import auth
from ft.errors import AuthenticationFailed, FrameError, PeerLost, TransportError
from ft.messages import MESSAGE_LIMIT, Hello, Proof, Wire, decode_agent, encode

HANDSHAKE_LIMIT = 512
"""Bytes of a frame before the other side has shown that it knows the secret."""
HANDSHAKE_DEADLINE = 5.0
_LENGTH = struct.Struct(">I")
_BUFFER = 64 << 10
_DESCRIPTORS = 8
_TURN = 4 << 20  # bytes read or written on one link before the others have their turn
_SCRATCH = memoryview(bytearray(_BUFFER))

Decoder: TypeAlias = Callable[[memoryview], Wire]


class TokenBucket:
    """A bandwidth cap: at most `rate` bytes per second over time and `burst` at once; None: no cap."""

    def __init__(self, rate: float | None, burst: int = _TURN, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self._clock = rate, burst, clock
        self._tokens, self._filled = float(burst), clock()

    def available(self) -> int:
        if self.rate is None:
            return _TURN
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._filled) * self.rate)
        self._filled = now
        return max(0, int(self._tokens))

    def take(self, size: int) -> None:
        self._tokens -= size

    def wait(self, size: int = 64 << 10) -> float:
        """Seconds until `size` bytes are available."""
        if self.rate is None:
            return 0.0
        return max(0.0, (min(size, self.burst) - self.available()) / self.rate)


class Channel:
    """Frames over one stream socket, which it owns. Reads and writes as far as the socket goes, never waits."""

    def __init__(self, sock: socket.socket, decode: Decoder, payload_limit: int) -> None:
        sock.setblocking(False)
        self.socket, self.decode, self.payload_limit = sock, decode, payload_limit
        self.message_limit = MESSAGE_LIMIT
        self.sent = self.received = 0
        self._in = bytearray(_BUFFER)
        self._have = self._used = 0
        self._message: Wire | None = None
        self._target: memoryview | None = None
        self._left = 0
        self._out: collections.deque[tuple[memoryview, Callable[[], None] | None]] = collections.deque()
        self._descriptors: list[int] = []
        self.pending = 0
        """Bytes queued and not yet given to the kernel."""
        self.descriptors: list[int] = []
        """Received over a Unix socket; whoever takes them owns them, the rest is closed with the channel."""

    def send(
        self,
        message: Wire | None,
        payload: memoryview | None = None,
        done: Callable[[], None] | None = None,
        descriptors: Iterable[int] = (),
    ) -> None:
        """Queue a frame (None: an empty one). `payload` must not change until `done` is called.

        `descriptors` travel with the frame over a Unix socket; they must stay open until it has been written.
        """
        body = encode(message) if message is not None else b""
        self._descriptors.extend(descriptors)
        self._queue(memoryview(_LENGTH.pack(len(body)) + body), done if payload is None else None)
        if payload is not None:
            self._queue(payload.cast("B"), done)

    def _queue(self, view: memoryview, done: Callable[[], None] | None) -> None:
        self._out.append((view, done))
        self.pending += view.nbytes

    def write(self, budget: int = _TURN) -> int:
        """Give at most `budget` bytes to the kernel; returns how many. Raises `PeerLost` when the other side left."""
        total = 0
        while self._out and total < budget:
            views, size = [], 0
            for view, _ in self._out:
                views.append(view[: budget - total - size])
                size += views[-1].nbytes
                if len(views) == 16 or total + size >= budget:
                    break
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._descriptors))]
                if self._descriptors
                else []
            )
            try:
                count = self.socket.sendmsg(views, ancillary)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                raise PeerLost(f"connection lost while sending: {error.strerror}") from error
            self._descriptors.clear()
            total += count
            self._sent(count)
            if count < size:
                break
        self.sent += total
        return total

    def _sent(self, count: int) -> None:
        self.pending -= count
        while count or (self._out and not self._out[0][0].nbytes):
            view, done = self._out.popleft()
            if count < view.nbytes:
                self._out.appendleft((view[count:], done))
                return
            count -= view.nbytes
            if done is not None:
                done()

    def read(self, target: Callable[[Wire, int], memoryview | None]) -> Iterator[tuple[Wire | None, memoryview | None]]:
        """Messages that have arrived whole, with their payloads; (None, None) for an empty frame.

        `target(message, size)` gives the memory for a payload, exactly `size` bytes, or None to drop it. Raises
        `FrameError` for what cannot be a frame, `PeerLost` when the other side has closed.
        """
        budget = _TURN
        yield from self._frames(target)  # left over from a reader that stopped in between
        while budget > 0:
            try:
                count = self._receive()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise PeerLost(f"connection lost while receiving: {error.strerror}") from error
            if count == 0:
                middle = self._message is not None or self._have > self._used
                raise PeerLost("closed by the other side" + (" in the middle of a frame" if middle else ""))
            self.received += count
            budget -= count
            yield from self._frames(target)

    def _receive(self) -> int:
        if self._message is not None:
            into = self._target[-self._left :] if self._target is not None else _SCRATCH[: self._left]
            count = self.socket.recv_into(into)
            self._left -= count
            return count
        if self._used:
            self._in[: self._have - self._used] = self._in[self._used : self._have]
            self._have, self._used = self._have - self._used, 0
        with memoryview(self._in) as whole, whole[self._have :] as room:
            if self.socket.family == socket.AF_UNIX:
                count, descriptors = _with_descriptors(self.socket, room)
                self.descriptors.extend(descriptors)
            else:
                count = self.socket.recv_into(room)
        self._have += count
        return count

    def _frames(
        self, target: Callable[[Wire, int], memoryview | None]
    ) -> Iterator[tuple[Wire | None, memoryview | None]]:
        while True:
            if self._message is not None:
                if self._left:
                    return
                message, payload = self._message, self._target
                self._message = self._target = None
                yield message, payload
            have = self._have - self._used
            if have < _LENGTH.size:
                return
            (length,) = _LENGTH.unpack_from(self._in, self._used)
            if length > self.message_limit:
                raise FrameError(f"frame of {length} bytes is over the limit of {self.message_limit}")
            if have < _LENGTH.size + length:
                missing = self._used + _LENGTH.size + length - len(self._in)
                if missing > 0:
                    self._in.extend(bytes(missing))
                return
            start = self._used + _LENGTH.size
            self._used = start + length
            if not length:
                yield None, None
                continue
            message = self._decoded(start, length)
            size = getattr(message, "size", None)
            if size is None:
                yield message, None
            else:
                self._expect(message, size, target)

    def _decoded(self, start: int, length: int) -> Wire:
        try:
            return self.decode(memoryview(bytes(self._in[start : start + length])))
        except FrameError:
            raise
        except TransportError as error:
            raise FrameError(str(error)) from error

    def _expect(self, message: Wire, size: int, target: Callable[[Wire, int], memoryview | None]) -> None:
        """Begin the payload of `message` with what of it has arrived together with the frame."""
        if size > self.payload_limit:
            raise FrameError(f"{type(message).__name__} with {size} bytes is over the limit of {self.payload_limit}")
        self._message, self._target = message, target(message, size)
        if self._target is not None and self._target.nbytes != size:
            raise FrameError(f"{type(message).__name__} has {size} bytes, there is room for {self._target.nbytes}")
        early = min(size, self._have - self._used)
        if self._target is not None:
            self._target[:early] = self._in[self._used : self._used + early]
        self._used += early
        self._left = size - early

    def close(self) -> None:
        """Close the socket; payloads not sent yet are released."""
        self.socket.close()
        while self.descriptors:
            os.close(self.descriptors.pop())
        self._message = self._target = None
        while self._out:
            _, done = self._out.popleft()
            if done is not None:
                done()
        self.pending = 0


def decoder_of(kind: Any) -> Decoder:
    """Decodes one of the messages of the union `kind`; raises `FrameError` on anything else."""
    decoder = msgspec.msgpack.Decoder(kind)

    def decode(data: memoryview) -> Wire:
        try:
            message: Wire = decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"malformed message: {error}") from error
        return message

    return decode


def _with_descriptors(sock: socket.socket, room: memoryview) -> tuple[int, list[int]]:
    count, ancillary, _, _ = sock.recvmsg_into([room], socket.CMSG_SPACE(4 * _DESCRIPTORS), socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return count, list(found)


class Handler(Protocol):
    """Whoever uses links. Called from the thread that drives the selector."""

    def connected(self, link: "Link") -> None:
        """The other side has shown that it knows the secret; `link.theirs` says who it is."""
        ...

    def lost(self, link: "Link", reason: str) -> None:
        """An open link has gone; called once."""
        ...

    def refused(self, link: "Link", reason: str) -> None:
        """A link never came to be open."""
        ...

    def target(self, link: "Link", message: Wire, size: int) -> memoryview | None:
        """Memory for the payload of `message`, exactly `size` bytes; None: drop it."""
        ...

    def received(self, link: "Link", message: Wire, payload: memoryview | None) -> None: ...

    def drained(self, link: "Link") -> None:
        """Little is queued on the link: bulk data may follow."""
        ...


class Link:
    """One connection, from the first byte of its handshake to its end."""

    LOW_WATER = 1 << 20

    def __init__(
        self, channel: Channel, selector: selectors.BaseSelector, handler: Handler, *, mine: Hello, secret: bytes,
        roles: frozenset[str], dialled: bool, label: str, cap: TokenBucket | None = None,
        silence: float | None = None, expected: int | None = None,
    ) -> None:  # fmt: skip
        """`expected` is the slot that must answer; `silence` the seconds without a byte after which it is lost."""
        self._expected = expected
        self.channel, self.mine, self.dialled, self.label = channel, mine, dialled, label
        self.theirs: Hello | None = None
        self.open = self.closed = self.paused = False
        self.reason = ""
        self._selector, self._handler, self._secret, self._roles = selector, handler, secret, roles
        self._cap, self._silence = cap or TokenBucket(None), silence
        self._began = self._heard = self._spoke = time.monotonic()
        self._connecting = dialled
        self._mask = 0
        channel.message_limit = HANDSHAKE_LIMIT
        channel.payload_limit, self._payload_limit = 0, channel.payload_limit
        channel.send(mine)
        self._watch(throttled=False)

    @property
    def slot(self) -> int:
        """The slot that the other side has shown to be; -1 before that."""
        return self.theirs.slot if self.theirs is not None and self.open else -1

    def send(
        self,
        message: Wire | None,
        payload: memoryview | None = None,
        done: Callable[[], None] | None = None,
        descriptors: Iterable[int] = (),
    ) -> None:
        """As `Channel.send`; nothing on a closed link, where `done` is called at once."""
        if self.closed:
            if done is not None:
                done()
            return
        self.channel.send(message, payload, done, descriptors)
        self._watch(throttled=self._throttled)

    def ready(self, mask: int) -> None:
        """The selector found the socket ready."""
        if self.closed:
            return
        with self._guard():
            if mask & selectors.EVENT_WRITE:
                self._write()
            if mask & selectors.EVENT_READ and not self.closed:
                for message, payload in self.channel.read(self._target):
                    self._heard = time.monotonic()
                    if message is not None:
                        self._take(message, payload)
                    if self.closed or self.paused:
                        return
                self._heard = time.monotonic()

    def tick(self, now: float) -> None:
        """Look after deadlines and throttling; to be called a few times a second."""
        if self.closed:
            return
        with self._guard():
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

    def pause(self) -> None:
        """Read nothing until `resume`: the other side feels it and waits."""
        self.paused = True
        self._watch(throttled=self._throttled)

    def resume(self) -> None:
        if self.paused and not self.closed:
            self.paused = False
            self._watch(throttled=self._throttled)
            # What lies in the buffer already makes no socket readable.
            self.ready(selectors.EVENT_READ)

    def close(self, reason: str) -> None:
        """End the link and tell the handler; nothing happens a second time."""
        if self.closed:
            return
        self.closed, self.reason = True, reason
        if self._mask:
            self._selector.unregister(self.channel.socket)
            self._mask = 0
        was_open, self.open = self.open, False
        self.channel.close()
        (self._handler.lost if was_open else self._handler.refused)(self, reason)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Whatever is wrong with this link ends this link alone."""
        try:
            yield
        except TransportError as error:
            self.close(str(error))

    def _target(self, message: Wire, size: int) -> memoryview | None:
        return self._handler.target(self, message, size)

    def _take(self, message: Wire, payload: memoryview | None) -> None:
        if self.open:
            self._handler.received(self, message, payload)
        elif isinstance(message, Hello) and self.theirs is None:
            auth.check_hello(self.mine, message, self._roles)
            if self._expected not in (None, message.slot):
                raise AuthenticationFailed(f"slot {self._expected} was expected, slot {message.slot} answered")
            self.theirs = message
            self.channel.send(auth.proof(self._secret, self.mine, message, dialled=self.dialled))
            self._watch(throttled=False)
        elif isinstance(message, Proof) and self.theirs is not None:
            auth.check_proof(self._secret, self.mine, self.theirs, message, dialled=self.dialled)
            self.open = True
            self.channel.message_limit, self.channel.payload_limit = MESSAGE_LIMIT, self._payload_limit
            self._handler.connected(self)
        else:
            raise AuthenticationFailed(f"{type(message).__name__} in the middle of the handshake")

    def _write(self) -> None:
        if self._connecting:
            error = self.channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise PeerLost(f"cannot be reached: error {error}")
            self._connecting = False
        budget = self._cap.available() if self.open else _TURN
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


class Peer(msgspec.Struct):
    """A slot that should be connected, and when to try again."""

    slot: int
    retry_at: float = 0.0
    delay: float = 0.05
    link: Link | None = None
    needed: float | None = None
    """Since when there is no way without a link."""


class Network:
    """Links to the agents of other slots. Of two agents the one with the lower slot dials, again and again.

    The higher one dials too, a little later, when the link is `needed`: the lower one may not want it.
    """

    ROLES = frozenset({"agent"})
    PATIENCE = 0.5
    """Seconds that the higher slot waits for the lower one to dial."""

    def __init__(
        self, selector: selectors.BaseSelector, handler: Handler, *, mine: Hello, secret: bytes, bind: tuple[str, int],
        resolve: Callable[[int], tuple[str, int] | None], payload_limit: int, rate: float | None = None,
        silence: float = 5.0,
    ) -> None:  # fmt: skip
        """`bind` is the address to listen on (port 0: any); `resolve(slot)` says where a peer listens, if known."""
        self._selector, self._handler, self._secret = selector, handler, secret
        self.mine, self._resolve, self._payload_limit, self._silence = mine, resolve, payload_limit, silence
        self.cap = TokenBucket(rate)
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
        """The slots to stay connected with, those `needed` in any case; links to others end."""
        wanted = set(slots) - {self.mine.slot}
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
        """The selector found a connection waiting."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, address = self._listener.accept()
            self._add(connection, f"{address[0]}:{address[1]}", dialled=False)

    def tick(self, now: float) -> None:
        for link in list(self._links):
            link.tick(now)
        for peer in self._peers.values():
            idle = peer.link is None or peer.link.closed
            mine = peer.slot > self.mine.slot or (peer.needed is not None and now > peer.needed + self.PATIENCE)
            if mine and idle and now >= peer.retry_at:
                peer.retry_at, peer.delay = now + peer.delay, min(1.0, peer.delay * 2)
                self._dial(peer)

    def opened(self, link: Link) -> None:
        """To be called by the handler for every open link: the newest link of a slot is the link of that slot."""
        peer = self._peers.setdefault(link.slot, Peer(link.slot))
        old = peer.link
        if old is not None and old.open and old is not link and _boot(link) < _boot(old):
            link.close("a later life of this slot is connected")
            return
        peer.link, peer.delay = link, 0.05
        if old is not None and old is not link:
            old.close("replaced by a newer connection")

    def forget(self, link: Link) -> None:
        """To be called by the handler for every link that ended."""
        self._links.discard(link)

    def close(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        for link in list(self._links):
            link.close("this agent is leaving")

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

    def _add(self, connection: socket.socket, label: str, *, dialled: bool, expected: int | None = None) -> Link:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(
            Channel(connection, decode_agent, self._payload_limit),
            self._selector,
            self._handler,
            mine=msgspec.structs.replace(self.mine, nonce=auth.nonce()),
            secret=self._secret,
            roles=self.ROLES,
            dialled=dialled,
            label=label,
            cap=self.cap,
            silence=self._silence,
            expected=expected,
        )
        self._links.add(link)
        return link


def _boot(link: Link) -> int:
    return link.theirs.boot if link.theirs is not None else -1
