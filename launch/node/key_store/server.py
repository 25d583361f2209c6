"""The store of the workers' keys: answers what supervisors pass on for the workers of their nodes.

A connection of a supervisor begins with `Opening`. Then each message is the number of a worker's connection and bytes
that it sent, or is to be sent; without bytes, that connection has ended. The keys are those of the newest start: a
connection for a later one ends those for earlier ones, and what they had set.
"""

import sys
import threading
from collections import deque
from functools import partial

import msgspec

from keepwarm.launch.node.connections import Connection, Server
from keepwarm.launch.node.key_store.keys import Keys
from keepwarm.launch.node.key_store.protocol import Client

NUMBER_BYTES = 4
CHUNK_BYTES = 256 << 10
"""Most bytes of one message."""
PENDING_BYTES = 4 << 20
"""Bytes that may be on their way to a supervisor; more wait here, and the supervisor is not read meanwhile."""
TURN_S = 0.1


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of a connection: the supervisor, and which start of all workers it is for."""

    node: str
    start: int


def numbered(number: int, data: bytes = b"") -> bytes:
    """Return the message with bytes of a worker's connection."""
    return number.to_bytes(NUMBER_BYTES, "little") + data


def parted(message: bytes) -> tuple[int, bytes]:
    """Return number and bytes of a message."""
    return int.from_bytes(message[:NUMBER_BYTES], "little"), message[NUMBER_BYTES:]


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
        self._opening = msgspec.json.Decoder(Opening)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._server.turn(TURN_S)
            for node in list(self._nodes.values()):
                if node.waiting:
                    self._send_waiting(node)
        self._server.stop()

    # ---- what arrives

    def _on_message(self, connection: Connection, body: bytes) -> None:
        node = self._nodes.get(connection)
        if node is None:
            self._open(connection, self._opening.decode(body))
            return
        number, data = parted(body)
        if not data:
            self._end(node, number)
            return
        client = node.clients.get(number)
        if client is None:
            client = node.clients[number] = Client(self._keys, partial(self._answer, node, number))
        try:
            client.feed(data)
        except ValueError as error:
            print(f"keepwarm: closed a worker's connection to the store, of {connection.node}: {error}"[:300],
                  file=sys.stderr)  # fmt: skip
            self._end(node, number)
            self._send(node, numbered(number))

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
        for start in range(0, len(data), CHUNK_BYTES):
            self._send(node, numbered(number, data[start : start + CHUNK_BYTES]))

    def _send(self, node: _Node, message: bytes) -> None:
        if not node.connection.link.closed:
            node.waiting.append(message)
            self._send_waiting(node)

    def _send_waiting(self, node: _Node) -> None:
        """Send what the connection can take now. While something waits, nothing more is taken from it."""
        link = node.connection.link
        while node.waiting and not link.closed and link.channel.pending < PENDING_BYTES:
            self._server.send(node.connection, node.waiting.popleft())
        if bool(node.waiting) != link.paused and not link.closed:
            (link.pause if node.waiting else link.resume)()
