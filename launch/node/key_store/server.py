"""The store of the workers' keys: answers what supervisors pass on for the workers of their nodes.

A connection of a supervisor begins with `Opening`. Then each message is a row of entries: the number of a worker's
connection, and bytes that it sent or is to be sent; without bytes, that connection has ended. A `FORETOLD` entry has
the answer to what the worker may send next. What is ready at one time travels in one message, so that many ranks cost
less each. The keys are those of the newest start: a connection for a later one ends those for earlier ones, and what
they had set.
"""

import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator
from functools import partial

import msgspec

from keepwarm.launch.node.connections import Connection, Server
from keepwarm.launch.node.key_store.keys import Keys
from keepwarm.launch.node.key_store.protocol import Client

CHUNK_BYTES = 256 << 10
"""Most bytes of one entry, and about as many as a message has."""
PENDING_BYTES = 4 << 20
"""Bytes that may be on their way to a supervisor; more wait here, and the supervisor is not read meanwhile."""
TURN_S = 0.1
FORETOLD = 1 << 31
"""Added to the number of a worker's connection: the bytes are a request and its answer, see `foretold`."""
_ENTRY = struct.Struct("<II")
"""Number of a worker's connection, and how many bytes follow."""
_LENGTH = struct.Struct("<I")


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of a connection: the supervisor, and which start of all workers it is for."""

    node: str
    start: int


def entry(number: int, data: bytes = b"") -> bytes:
    """Return what tells of some bytes of a worker's connection."""
    return _ENTRY.pack(number, len(data)) + data


def entries(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each entry. Raise ValueError if the message does not end with one."""
    at = 0
    while at < len(message):
        if len(message) - at < _ENTRY.size:
            raise ValueError("a message ends within an entry")
        number, length = _ENTRY.unpack_from(message, at)
        at += _ENTRY.size + length
        if at > len(message):
            raise ValueError("a message ends within an entry")
        yield number, message[at - length : at]


def foretell(request: bytes, answer: bytes) -> bytes:
    return _LENGTH.pack(len(request)) + request + answer


def foretold(data: bytes) -> tuple[bytes, bytes]:
    """Return a request that may come next, and the answer to it. Raise ValueError if it is cut off."""
    if len(data) < _LENGTH.size:
        raise ValueError("a message ends within an entry")
    end = _LENGTH.size + int(_LENGTH.unpack_from(data)[0])
    return data[_LENGTH.size : end], data[end:]


class _Node:
    """A supervisor's connection: the clients of its workers by number, and what is still to be sent to it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.clients: dict[int, Client] = {}
        self.waiting: deque[bytes] = deque()


class KeyServer:
    """Serves the keys on a thread of its own. Nothing that arrives ends it."""

    def __init__(self, secret: bytes, host: str) -> None:
        """Begin to listen; nothing is taken from those that do not know the secret."""
        self._server = Server(secret, host, self._on_message, self._on_closed)
        self.port = self._server.port
        self._keys, self._start = Keys(), -1
        self._nodes: dict[Connection, _Node] = {}
        self._answered, self._blocked = set[_Node](), set[_Node]()
        """Those for which something is to be sent; those that did not take all of it yet."""
        self._opening = msgspec.json.Decoder(Opening)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._server.turn(0.0 if self._answered else TURN_S)
            answered, self._answered = self._answered, set()
            for node in answered | self._blocked:
                self._send(node)
        self._server.stop()

    # ---- what arrives

    def _on_message(self, connection: Connection, body: bytes) -> None:
        node = self._nodes.get(connection)
        if node is None:
            self._open(connection, self._opening.decode(body))
            return
        for number, data in entries(body):
            self._take(node, number, data)

    def _take(self, node: _Node, number: int, data: bytes) -> None:
        if not data:
            self._end(node, number)
            return
        client = node.clients.get(number)
        if client is None:
            client = node.clients[number] = Client(
                self._keys, partial(self._answer, node, number), partial(self._foretell, node, number)
            )
        try:
            client.feed(data)
        except ValueError as error:
            print(f"keepwarm: closed a worker's connection to the store, of {node.connection.node}: {error}"[:300],
                  file=sys.stderr)  # fmt: skip
            self._end(node, number)
            self._answer(node, number, b"")

    def _open(self, connection: Connection, opening: Opening) -> None:
        if opening.start < self._start:
            raise ValueError(f"start {opening.start} of the workers is over: start {self._start} has begun")
        if opening.start > self._start:
            self._start, self._keys = opening.start, Keys()
            for other in list(self._nodes):
                self._server.close(other)
        connection.node = opening.node
        self._nodes[connection] = _Node(connection)

    def _on_closed(self, connection: Connection) -> None:
        node = self._nodes.pop(connection, None)
        if node is not None:
            for number in list(node.clients):
                self._end(node, number)

    def _end(self, node: _Node, number: int) -> None:
        client = node.clients.pop(number, None)
        if client is not None:
            client.close()

    # ---- what is sent

    def _answer(self, node: _Node, number: int, data: bytes) -> None:
        """Have some bytes sent; without any, have the worker's connection closed."""
        for start in range(0, max(1, len(data)), CHUNK_BYTES):
            node.waiting.append(entry(number, data[start : start + CHUNK_BYTES]))
        self._answered.add(node)

    def _foretell(self, node: _Node, number: int, request: bytes, answer: bytes) -> None:
        node.waiting.append(entry(number | FORETOLD, foretell(request, answer)))

    def _send(self, node: _Node) -> None:
        """Send what the connection can take now. While something waits, nothing more is taken from it."""
        link = node.connection.link
        while node.waiting and not link.closed and link.channel.pending < PENDING_BYTES:
            message = bytearray()
            while node.waiting and len(message) < CHUNK_BYTES:
                message += node.waiting.popleft()
            self._server.send(node.connection, bytes(message))
        if link.closed or not node.waiting:
            self._blocked.discard(node)
        else:
            self._blocked.add(node)
        if not link.closed and link.paused != bool(node.waiting):
            (link.pause if node.waiting else link.resume)()
