"""This node's heartbeats to the store, on a thread that does nothing else: no files, no connections to others."""

import contextlib
import threading
import time

from keepwarm.launch.node.connections import Dialled
from keepwarm.launch.node.record import StoreRecord
from keepwarm.launch.node.shared_table import Hello

HEARTBEAT, FAREWELL, MOVED = b".", b"!", b"?"
"""What the connection carries: a sign of life, which is answered; the node leaves the run, or for another store."""


class Heartbeat:
    """Sends this node's heartbeats, and notices when the store is lost."""

    def __init__(
        self, secret: bytes, record: StoreRecord, node: str, peer_timeout: float, connect_timeout: float
    ) -> None:
        """Connect; return once the server has answered. Raises `OSError`."""
        self.lost = ""
        """Why the store is lost; empty while it is not."""
        self._record, self._peer_timeout = record, peer_timeout
        self._interval = min(0.2, peer_timeout / 5)
        self._stop = threading.Event()
        self._connection = Dialled(
            secret, (record.host, record.heartbeat_port), connect_timeout=connect_timeout, timeout=peer_timeout
        )
        try:
            self._connection.send(Hello(node=node, heartbeat=True))
            if self._connection.receive(peer_timeout) is None:
                raise TimeoutError("the store does not answer")
        except OSError:
            self._connection.close()
            raise
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, *, farewell: bool) -> None:
        """Stop. With a farewell this node leaves the run; without, it goes on under another store."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self._connection.send(FAREWELL if farewell else MOVED)
        self._thread.join(self._peer_timeout + 1)
        self._connection.close()

    def _run(self) -> None:
        last_heard = time.monotonic()
        while not self._stop.wait(self._interval) and not self.lost:
            before = time.monotonic()
            try:
                self._connection.send(HEARTBEAT)
                if self._connection.receive(self._interval) is not None:
                    last_heard = time.monotonic()
                    continue
                # Count only time in which this thread could have received: it may have been frozen itself.
                if before - last_heard > 2 * self._peer_timeout:
                    last_heard = max(last_heard, before - self._peer_timeout / 2)
                if time.monotonic() - last_heard > self._peer_timeout:
                    self.lost = f"waited {self._peer_timeout:g} s for store {self._record.number} to answer"
            except OSError as error:
                self.lost = f"the connection to store {self._record.number} was lost: {error}"
