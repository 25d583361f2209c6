"""Framed JSON over TCP between the supervisors of a run and its store: a server that never waits, a parallel client.

A frame is four bytes of length and a body. Connections are bounded in number, frames in length, and a connection that
has not identified itself is the first to be closed.
"""

import collections
import contextlib
import errno
import resource
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

FRAME_LIMIT = 8 << 20
"""Longest body: a table of 4,096 nodes with their addresses has about a tenth of it."""
UNIDENTIFIED_S = 10.0
"""How long a connection may stay without having identified itself."""
CONNECTIONS = 16_384
CONCURRENT = 256
"""Connections that `exchange` has at once."""
_READ = 1 << 16
_HEADER = 4
Key = TypeVar("Key")
Address = tuple[str, int]
NoAnswer = Literal["refused", "silent"]
"""refused: the machine answered that no process listens there; silent: nothing is known."""


def frame(message: object) -> bytes:
    """Return a message as a frame."""
    body = message if isinstance(message, bytes) else msgspec.json.encode(message)
    return len(body).to_bytes(_HEADER, "big") + body


def split(received: bytearray) -> Iterator[bytes]:
    """Remove and yield the bodies of all complete frames.

    Raises:
        ValueError: a frame is longer than `FRAME_LIMIT`.
    """
    while len(received) >= _HEADER:
        size = int.from_bytes(received[:_HEADER], "big")
        if size > FRAME_LIMIT:
            raise ValueError(f"a frame of {size} bytes, more than {FRAME_LIMIT}")
        if len(received) < _HEADER + size:
            return
        body = bytes(received[_HEADER : _HEADER + size])
        del received[: _HEADER + size]
        yield body


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def address_of(host: str) -> str:
    """Return the numeric address of a host, so that nothing has to be looked up once the network is down."""
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    return host


@dataclass(eq=False)
class Connection:
    """One client of a `FrameServer`."""

    stream: socket.socket
    last_heard: float
    node: str = ""
    """Name under which it identified itself."""
    heartbeat: bool = False
    moved: bool = False
    """It said that it left for another store, so that its closing does not mean that its process is dead."""
    version: int = -1
    """Of the last table sent to it."""
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    waiting: bool = False
    """It is told when the connection can take more."""


class FrameServer:
    """Accepts connections and hands their frames to `on_frame`; runs on the thread that calls `turn`.

    A frame that `on_frame` refuses with a `ValueError` closes its connection; nothing that arrives ends the server.
    """

    def __init__(
        self, host: str, on_frame: Callable[[Connection, bytes], None], on_closed: Callable[[Connection], None]
    ) -> None:
        self._on_frame, self._on_closed = on_frame, on_closed
        self._listener = socket.create_server((host, 0), backlog=4096)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self.connections: dict[int, Connection] = {}
        self.port: int = self._listener.getsockname()[1]
        self._swept_at = 0.0

    def turn(self, seconds: float) -> None:
        """Serve what is ready; wait at most `seconds` for it."""
        for key, mask in self._selector.select(seconds):
            if key.data is None:
                self._accept()
                continue
            if mask & selectors.EVENT_WRITE:
                self._flush(key.data)
            if mask & selectors.EVENT_READ and key.data.stream.fileno() >= 0:
                self._read(key.data)
        now = time.monotonic()
        if now - self._swept_at > 1.0:
            self._swept_at = now
            for connection in list(self.connections.values()):
                if not connection.node and now - connection.last_heard > UNIDENTIFIED_S:
                    self.close(connection)

    def send(self, connection: Connection, data: bytes) -> None:
        """Send a frame without waiting; what the connection cannot take yet is kept for it."""
        if len(connection.unsent) > 2 * FRAME_LIMIT:
            self.close(connection)
            return
        connection.unsent += data
        self._flush(connection)

    def close(self, connection: Connection) -> None:
        if self.connections.pop(connection.stream.fileno(), None) is not None:
            self._selector.unregister(connection.stream)
            connection.stream.close()
            self._on_closed(connection)

    def stop(self) -> None:
        """Close the listener and every connection."""
        for connection in list(self.connections.values()):
            self.close(connection)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # No descriptor is left, or the client has gone already: the oldest stranger makes room.
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._shed()
            return
        if len(self.connections) >= CONNECTIONS:
            self._shed()
        accepted.setblocking(False)
        connection = Connection(accepted, time.monotonic())
        self.connections[accepted.fileno()] = connection
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _shed(self) -> None:
        oldest = next((one for one in self.connections.values() if not one.node), None)
        if oldest is not None:
            self.close(oldest)

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.stream.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close(connection)
            return
        if connection.node:
            connection.last_heard = time.monotonic()
        connection.received += data
        try:
            for body in split(connection.received):
                self._on_frame(connection, body)
                if connection.stream.fileno() < 0:
                    return
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            print(f"keepwarm: closed a connection of {connection.node or 'a stranger'}: {error}"[:300], file=sys.stderr)
            self.close(connection)

    def _flush(self, connection: Connection) -> None:
        try:
            while connection.unsent:
                sent = connection.stream.send(connection.unsent)
                del connection.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.close(connection)
            return
        if connection.waiting != bool(connection.unsent):
            connection.waiting = bool(connection.unsent)
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.waiting else 0)
            self._selector.modify(connection.stream, wanted, connection)


def exchange(
    addresses: Mapping[Key, Address], message: object, timeout: float, *,
    enough: Callable[[Mapping[Key, bytes | NoAnswer]], bool] = lambda _: False,
) -> dict[Key, bytes | NoAnswer]:  # fmt: skip
    """Send one message to many addresses at once; return each one's answer, or why there is none.

    Args:
        addresses: numeric addresses; asked in this order, `CONCURRENT` at a time.
        message: what is sent.
        timeout: seconds for each of them.
        enough: return True for answers that settle the matter; the others are then not waited for.
    """
    answers: dict[Key, bytes | NoAnswer] = {}
    waiting = collections.deque(addresses.items())
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        while not enough(answers):
            while waiting and len(selector.get_map()) < CONCURRENT:
                key, address = waiting.popleft()
                call = _Call(key, address, message)
                stack.callback(call.stream.close)
                if (reason := call.connect()) is not None:
                    answers[key] = reason
                else:
                    selector.register(call.stream, selectors.EVENT_READ | selectors.EVENT_WRITE, call)
            if not selector.get_map():
                break
            for ready, mask in selector.select(0.05):
                if (answer := ready.data.ready(mask)) is not None:
                    answers[ready.data.key] = answer
                    selector.unregister(ready.fileobj)
                elif not ready.data.unsent:
                    selector.modify(ready.fileobj, selectors.EVENT_READ, ready.data)
            for late in list(selector.get_map().values()):
                if time.monotonic() - late.data.began > timeout:
                    answers[late.data.key] = "silent"
                    selector.unregister(late.fileobj)
    return answers


def ask(address: Address, message: object, timeout: float) -> bytes | NoAnswer:
    """Send one message; return the answer, or why there is none."""
    return exchange({0: address}, message, timeout).get(0, "silent")


class _Call:
    """One connection of `exchange`."""

    def __init__(self, key: Any, address: Address, message: object) -> None:
        self.key, self._address, self.began = key, address, time.monotonic()
        self.stream = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self.stream.setblocking(False)
        self.unsent, self._received = bytearray(frame(message)), bytearray()

    def connect(self) -> NoAnswer | None:
        try:
            return _no_answer(self.stream.connect_ex(self._address))
        except OSError:
            return "silent"

    def ready(self, mask: int) -> bytes | NoAnswer | None:
        try:
            if mask & selectors.EVENT_WRITE and self.unsent:
                if (reason := _no_answer(self.stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))) is not None:
                    return reason
                del self.unsent[: self.stream.send(self.unsent)]
            if mask & selectors.EVENT_READ:
                data = self.stream.recv(_READ)
                self._received += data
                for body in split(self._received):
                    return body
                if not data:
                    return "silent"
        except BlockingIOError:
            return None
        except ConnectionRefusedError:
            return "refused"
        except (OSError, ValueError):
            return "silent"
        return None


def _no_answer(code: int) -> NoAnswer | None:
    if code in (0, errno.EINPROGRESS, errno.EAGAIN):
        return None
    return "refused" if code == errno.ECONNREFUSED else "silent"
