"""Messages over TCP between the supervisors of a run and its store: a server that never waits, and callers.

Both ends prove that they know the secret of the run before anything else is read, every message carries a MAC, and
connections that have not proved anything are few and small: this is the link of the snapshot agents
(`keepwarm.ft.transport`) with one kind of message, whose bytes are JSON.
"""

import collections
import contextlib
import errno
import selectors
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from keepwarm.ft.errors import TransportError
from keepwarm.ft.protocol.messages import MESSAGE_LIMIT, Hello, Wire
from keepwarm.ft.transport.auth import NONCE_BYTES, run_identity
from keepwarm.ft.transport.channel import Channel, decoder_of
from keepwarm.ft.transport.identity import claim_secret, hold_secret
from keepwarm.ft.transport.link import Credentials, FarEnd, Link
from keepwarm.ft.transport.listener import Listener, Strangers

UNIDENTIFIED_S = 10.0
"""How long a connection may stay without having said which node it is of."""
REFUSALS_INTERVAL_S = 10.0
"""At least this long between two lines about refused connections."""
TICK_INTERVAL_S = 0.2
CONCURRENT = 256
"""Connections that `exchange` has at once."""
_CALLER, _SERVER = "caller", "server"
_NO_PAYLOAD = 0
Key = TypeVar("Key")
Address = tuple[str, int]
NoAnswer = Literal["refused", "silent"]
"""refused: the machine answered that no process listens there; silent: nothing is known."""


class Body(Wire, frozen=True):
    """The one kind of message."""

    data: bytes


_decode = decoder_of(Body)


@cache
def run_secret(folder: Path) -> bytes:
    """Return the secret of a run, created by the first node that asks for it.

    It is read once: a store that is opened later is a fork of a process that has it, and needs no file.

    Raises:
        AuthenticationFailed: other users can read or replace it.
        OSError: it cannot be created.
    """
    secret = claim_secret(folder)
    hold_secret(folder, secret)
    return secret


def packed(message: object) -> bytes:
    """Return the bytes of a message."""
    return message if isinstance(message, bytes) else msgspec.json.encode(message)


def address_of(host: str) -> str:
    """Return the numeric address of a host, so that nothing has to be looked up once the network is down."""
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    return host


def _credentials(secret: bytes, role: str, other: str) -> Credentials:
    hello = Hello(role=role, run=run_identity(secret), slot=0, epoch=0, incarnation=0, nonce=bytes(NONCE_BYTES))
    return Credentials(hello=hello, secret=secret, roles=frozenset({other}))


class Events(ABC):
    """Receives the events of links on which no message has a payload and nothing is sent in portions."""

    def target(self, link: Link, message: Wire, size: int) -> memoryview | None:
        return None

    def drained(self, link: Link) -> None:
        return None

    @abstractmethod
    def connected(self, link: Link) -> None: ...

    @abstractmethod
    def refused(self, link: Link, reason: str) -> None: ...

    @abstractmethod
    def lost(self, link: Link, reason: str) -> None: ...

    @abstractmethod
    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None: ...


def _label(address: Sequence[Any]) -> str:
    return f"{address[0]}:{address[1]}"


def _open(
    stream: socket.socket, selector: selectors.BaseSelector, handler: Events, credentials: Credentials, far: FarEnd
) -> Link:
    """Begin the handshake on a connection, which the link then owns. Raises OSError."""
    try:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Link(Channel(stream, _decode, _NO_PAYLOAD), selector, handler, credentials, far)
    except OSError:
        stream.close()
        raise


def dialled(
    secret: bytes, stream: socket.socket, address: Address, selector: selectors.BaseSelector, handler: Events
) -> Link:
    """Begin the handshake on a connection to a `Server`, which the link then owns. Raises OSError."""
    credentials = _credentials(secret, _CALLER, _SERVER)
    return _open(stream, selector, handler, credentials, FarEnd(label=_label(address), dialled=True))


@dataclass(eq=False)
class Connection:
    """One caller of a `Server` that knows the secret."""

    link: Link
    last_heard: float
    node: str = ""
    """Name under which it identified itself."""
    heartbeat: bool = False
    moved: bool = False
    """It said that it left for another store, so that its closing does not mean that its process is dead."""
    version: int = -1
    """Of the last table sent to it."""

    @property
    def behind(self) -> bool:
        """Whether something sent to it has not left yet."""
        return self.link.channel.pending > 0


class Server(Events):
    """Accepts connections and hands their messages to `on_message`; runs on the thread that calls `turn`.

    A message that `on_message` refuses with a `ValueError` closes its connection; nothing that arrives ends the server.
    """

    def __init__(
        self, secret: bytes, host: str, on_message: Callable[[Connection, bytes], None],
        on_closed: Callable[[Connection], None],
    ) -> None:  # fmt: skip
        self._on_message, self._on_closed = on_message, on_closed
        self._credentials = _credentials(secret, _SERVER, _CALLER)
        self._selector = selectors.DefaultSelector()
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listener = Listener(
            socket.create_server((host, 0), family=family, backlog=4096), self._selector, self
        )  # fmt: skip
        self.port: int = self._listener.socket.getsockname()[1]
        self._strangers, self._waiting = Strangers(), set[Link]()
        self.connections: dict[Link, Connection] = {}
        self._ticked_at = self._refusals_at = 0.0
        self._refusals = 0

    def turn(self, seconds: float) -> None:
        """Serve what is ready; wait at most `seconds` for it."""
        for key, mask in self._selector.select(seconds):
            key.data.ready(mask)
        now = time.monotonic()
        if now - self._ticked_at < TICK_INTERVAL_S:
            return
        self._ticked_at = now
        self._listener.tick()
        for link in list(self._waiting):
            link.tick(now)
        for connection in list(self.connections.values()):
            if not connection.node and now - connection.last_heard > UNIDENTIFIED_S:
                self.close(connection)

    def send(self, connection: Connection, message: object) -> None:
        """Send without waiting; what the connection cannot take yet is kept for it."""
        link = connection.link
        if link.channel.pending > 4 * MESSAGE_LIMIT:
            self.close(connection)
            return
        try:
            link.post(Body(data=packed(message)))
        except TransportError as error:  # it is too long
            self._report(connection, error)

    def close(self, connection: Connection) -> None:
        connection.link.close("closed here")

    def stop(self) -> None:
        """Close the listener and every connection."""
        for link in (*self._waiting, *self.connections):
            link.close("the server ends")
        self._listener.close()
        self._selector.close()

    def ready(self, mask: int) -> None:
        """Accept a connection that waits."""
        shed = self._listener.shed
        accepted = self._listener.accept()
        if accepted is None:
            if self._listener.shed > shed:
                self._strangers.close_oldest()
            return
        stream, address = accepted
        far = FarEnd(label=_label(address), dialled=False)
        with contextlib.suppress(OSError):  # it has gone already
            link = _open(stream, self._selector, self, self._credentials, far)
            self._waiting.add(link)
            self._strangers.add(link, address[0])

    # ---- events of links

    def connected(self, link: Link) -> None:
        self._waiting.discard(link)
        self._strangers.discard(link)
        self.connections[link] = Connection(link, time.monotonic())

    def refused(self, link: Link, reason: str) -> None:
        self._waiting.discard(link)
        self._strangers.discard(link)
        self._refusals += 1
        now = time.monotonic()
        if now - self._refusals_at > REFUSALS_INTERVAL_S:
            print(f"keepwarm: refused {self._refusals} connections, the last one of {link.label}: {reason}"[:300],
                  file=sys.stderr)  # fmt: skip
            self._refusals, self._refusals_at = 0, now

    def lost(self, link: Link, reason: str) -> None:
        connection = self.connections.pop(link, None)
        if connection is not None:
            self._on_closed(connection)

    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None:
        connection = self.connections[link]
        if connection.node:
            connection.last_heard = time.monotonic()
        assert isinstance(message, Body)
        try:
            self._on_message(connection, message.data)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self._report(connection, error)

    def _report(self, connection: Connection, error: Exception) -> None:
        print(f"keepwarm: closed a connection of {connection.node or 'a node'}: {error}"[:300], file=sys.stderr)
        self.close(connection)


class Dialled(Events):
    """A connection to a `Server`. Any thread may send; one receives."""

    def __init__(self, secret: bytes, address: Address, *, connect_timeout: float, timeout: float) -> None:
        """Connect; return once both ends have proved that they know the secret, at most `timeout` seconds later.

        Raises OSError.
        """
        self._lock, self._reason = threading.RLock(), ""
        self._received: collections.deque[bytes] = collections.deque()
        self._selector = selectors.DefaultSelector()
        stream = socket.create_connection(address, timeout=connect_timeout)
        self._link = dialled(secret, stream, address, self._selector, self)
        end = time.monotonic() + timeout
        while not self._link.open:
            self._turn(0.1)
            if self._link.closed or time.monotonic() > end:
                self.close()
                raise ConnectionError(self._reason)

    def send(self, message: object) -> None:
        """Send without waiting. Raises ConnectionError."""
        with self._lock:
            if not self._link.closed:
                self._link.post(Body(data=packed(message)))
            if self._link.closed:
                raise ConnectionError(self._reason)

    def receive(self, timeout: float) -> bytes | None:
        """Return the next message, or None after `timeout` seconds. Raises ConnectionError."""
        end = time.monotonic() + timeout
        while not self._received:
            if self._link.closed:
                raise ConnectionError(self._reason)
            self._turn(max(0.0, end - time.monotonic()))
            if not self._received and not self._link.closed and time.monotonic() >= end:
                return None
        return self._received.popleft()

    def close(self) -> None:
        with self._lock:
            self._link.close("closed here")
            self._selector.close()

    def _turn(self, seconds: float) -> None:
        try:
            found = self._selector.select(seconds)
        except (OSError, ValueError):  # another thread has closed it
            return
        with self._lock:
            for _, mask in found:
                self._link.ready(mask)

    def connected(self, link: Link) -> None:
        pass

    def lost(self, link: Link, reason: str) -> None:
        self._reason = reason

    def refused(self, link: Link, reason: str) -> None:
        self._reason = reason

    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None:
        assert isinstance(message, Body)
        self._received.append(message.data)


def exchange(
    secret: bytes, addresses: Mapping[Key, Address], message: object, timeout: float, *,
    enough: Callable[[Mapping[Key, bytes | NoAnswer]], bool] = lambda _: False,
) -> dict[Key, bytes | NoAnswer]:  # fmt: skip
    """Send one message to many addresses at once; return each one's answer, or why there is none.

    Args:
        secret: of the run; an address whose process does not know it counts as silent.
        addresses: numeric addresses; asked in this order, `CONCURRENT` at a time.
        message: what is sent.
        timeout: seconds for each of them.
        enough: return True for answers that settle the matter; the others are then not waited for.
    """
    answers: dict[Key, bytes | NoAnswer] = {}
    waiting = collections.deque(addresses.items())
    credentials, body = _credentials(secret, _CALLER, _SERVER), Body(data=packed(message))
    calls: dict[Key, _Call] = {}
    with selectors.DefaultSelector() as selector:
        while not enough(answers):
            while waiting and len(calls) < CONCURRENT:
                key, address = waiting.popleft()
                calls[key] = _Call(address, body, credentials, selector)
            if not calls:
                break
            if all(call.answer is None for call in calls.values()):
                for ready, mask in selector.select(0.05):
                    ready.data.ready(mask)
            now = time.monotonic()
            for key, call in list(calls.items()):
                if call.answer is not None or now - call.began > timeout:
                    answers[key] = call.answer or "silent"
                    calls.pop(key).close()
        for call in calls.values():
            call.close()
    return answers


def ask(secret: bytes, address: Address, message: object, timeout: float) -> bytes | NoAnswer:
    """Send one message; return the answer, or why there is none."""
    return exchange(secret, {0: address}, message, timeout).get(0, "silent")


class _Call(Events):
    """One connection of `exchange`."""

    def __init__(
        self, address: Address, body: Body, credentials: Credentials, selector: selectors.BaseSelector
    ) -> None:
        self.answer: bytes | NoAnswer | None = None
        self.began = time.monotonic()
        self._body, self._credentials, self._selector = body, credentials, selector
        self._far = FarEnd(label=_label(address), dialled=True)
        self._link: Link | None = None
        self._stream = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self._stream.setblocking(False)
        try:
            self.answer = _no_answer(self._stream.connect_ex(address))
        except OSError:
            self.answer = "silent"
        selector.register(self._stream, selectors.EVENT_WRITE, self)

    def ready(self, mask: int) -> None:
        """Begin the handshake, if there is a connection."""
        self._selector.unregister(self._stream)
        self.answer = _no_answer(self._stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        if self.answer is None:
            try:
                self._link = _open(self._stream, self._selector, self, self._credentials, self._far)
            except OSError:
                self.answer = "silent"

    def close(self) -> None:
        if self._link is not None:
            self._link.close("closed here")
            return
        if self._stream.fileno() in self._selector.get_map():
            self._selector.unregister(self._stream)
        self._stream.close()

    def connected(self, link: Link) -> None:
        link.send(self._body)

    def lost(self, link: Link, reason: str) -> None:
        self.answer = self.answer or "silent"

    def refused(self, link: Link, reason: str) -> None:
        self.answer = self.answer or "silent"

    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None:
        assert isinstance(message, Body)
        self.answer = message.data


def _no_answer(code: int) -> NoAnswer | None:
    if code in (0, errno.EINPROGRESS, errno.EAGAIN):
        return None
    return "refused" if code == errno.ECONNREFUSED else "silent"
