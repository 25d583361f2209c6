"""Heartbeats by which supervisors and store notice each other's death: the server beside the store, and its clients.

A supervisor keeps one connection to the server, sends its name once and then a byte a few times a second, each of
which is answered. A connection that closes is a death at once; silence is one after `peer_timeout` seconds.
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from keepwarm.launch.node import record as node_record
from keepwarm.launch.node.record import StoreRecord
from keepwarm.trainer.job.run_folder import RunFolder

CLOCK_INTERVAL_S = 0.05
"""How often the server checks for silent connections."""
LEASE_S = 30.0
"""How long the server runs without a connection."""
_NAME_LIMIT = 256
_HEARTBEAT, _FAREWELL = b".", b"!"


class _Connection(msgspec.Struct):
    """A supervisor's connection to the server."""

    stream: socket.socket
    last_heard: float
    node: str = ""
    received: bytes = b""
    """Before the name is complete."""


class HeartbeatServer:
    """Tells which nodes have died; runs on the thread that calls `run`."""

    def __init__(self, host: str, peer_timeout: float, on_lost: Callable[[str, str, float], None]) -> None:
        """`on_lost(node, cause, seconds of silence)` is called once for each node that died."""
        self._peer_timeout, self._on_lost = peer_timeout, on_lost
        self._listener = socket.create_server((host, 0), backlog=4096)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._connections: dict[int, _Connection] = {}
        self.port: int = self._listener.getsockname()[1]

    def run(self, superseded: Callable[[], bool]) -> None:
        """Serve until nothing has been connected for `LEASE_S`, or `superseded()` while nothing is connected."""
        needed = before = time.monotonic()
        while True:
            for key, _ in self._selector.select(CLOCK_INTERVAL_S):
                self._accept() if key.data is None else self._on_readable(key.data)
            now = time.monotonic()
            if now - before > max(self._peer_timeout / 2, 10 * CLOCK_INTERVAL_S):
                # This process itself was held up: heartbeats that arrived meanwhile are still unread.
                for connection in self._connections.values():
                    connection.last_heard = now
            before = now
            for connection in list(self._connections.values()):
                if now - connection.last_heard > self._peer_timeout:
                    self._lose(connection, f"no heartbeat for {self._peer_timeout:g} s", self._peer_timeout)
            if self._connections:
                needed = now
            elif now - needed > LEASE_S or superseded():
                return

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            accepted.setblocking(False)
            connection = _Connection(accepted, time.monotonic())
            self._connections[accepted.fileno()] = connection
            self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _on_readable(self, connection: _Connection) -> None:
        try:
            data = connection.stream.recv(_NAME_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose(connection, "its supervisor has gone")
            return
        connection.last_heard = time.monotonic()
        if not connection.node:
            connection.received += data
            name, complete, data = connection.received.partition(b"\n")
            if not complete:
                if len(connection.received) > _NAME_LIMIT:
                    self._close(connection)
                return
            connection.node = name.decode(errors="replace")
            data = data or _HEARTBEAT
        if _FAREWELL in data:
            self._close(connection)
            return
        with contextlib.suppress(OSError):
            connection.stream.send(_HEARTBEAT)

    def _lose(self, connection: _Connection, cause: str, silence: float = 0.0) -> None:
        self._close(connection)
        reconnected = any(other.node == connection.node for other in self._connections.values())
        if connection.node and not reconnected:
            self._on_lost(connection.node, cause, silence)

    def _close(self, connection: _Connection) -> None:
        self._connections.pop(connection.stream.fileno(), None)
        self._selector.unregister(connection.stream)
        connection.stream.close()


class Heartbeat:
    """Sends this node's heartbeats on a thread of its own, and notices when the store is lost."""

    def __init__(self, record: StoreRecord, node: str, peer_timeout: float, folder: Path) -> None:
        """Connect; return once the server has answered. Raises `OSError`."""
        self.lost = ""
        """Why the store is lost; empty while it is not."""
        self._record, self._peer_timeout, self._folder = record, peer_timeout, folder
        self._interval = min(0.2, peer_timeout / 5)
        self._stop = threading.Event()
        self._connection = socket.create_connection((record.host, record.heartbeat_port), timeout=peer_timeout)
        try:
            self._connection.sendall(node.encode() + b"\n")
            if not self._connection.recv(16):
                raise ConnectionResetError("the store closed the connection")
        except OSError:
            self._connection.close()
            raise
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, *, farewell: bool) -> None:
        """Stop; without a farewell the server considers this node dead."""
        self._stop.set()
        if farewell:
            with contextlib.suppress(OSError):
                self._connection.sendall(_FAREWELL)
        self._thread.join(self._peer_timeout + 1)
        self._connection.close()

    def _run(self) -> None:
        last_heard = last_check = time.monotonic()
        self._connection.settimeout(self._interval)
        while not self._stop.wait(self._interval) and not self.lost:
            before = time.monotonic()
            try:
                self._connection.send(_HEARTBEAT)
                if not self._connection.recv(64):
                    raise ConnectionResetError("closed")
                last_heard = time.monotonic()
            except TimeoutError:
                # Count only time in which this thread could have received: it may have been frozen itself.
                if before - last_heard > 2 * self._peer_timeout:
                    last_heard = max(last_heard, before - self._peer_timeout / 2)
                if time.monotonic() - last_heard > self._peer_timeout:
                    self.lost = f"waited {self._peer_timeout:g} s for store {self._record.number} to answer"
            except OSError as error:
                self.lost = f"the connection to store {self._record.number} was lost: {error}"
            if time.monotonic() - last_check > 1.0:
                last_check = time.monotonic()
                self._check_for_newer_store()

    def _check_for_newer_store(self) -> None:
        """Give this store up for a newer one that is reachable, or under which workers have been started."""
        newest = node_record.newest_store(self._folder)
        if newest is None or newest.number <= self._record.number:
            return
        active = (RunFolder(self._folder).nodes / f"store-{newest.number}.active").exists()
        with contextlib.suppress(OSError):
            socket.create_connection((newest.host, newest.heartbeat_port), timeout=self._peer_timeout).close()
            active = True
        if active:
            self.lost = f"store {newest.number} has replaced store {self._record.number}"
