"""One connection of this machine to a `StoreProxy`, watched by its selector."""

import selectors
import socket
import time
from collections.abc import Callable

from keepwarm.launch.node.connections import Address
from keepwarm.launch.node.key_store.server import PENDING_BYTES

_RECEIVE_BYTES = 64 << 10


class Ready:
    """What the selector's loop calls for a descriptor, as it calls a `Link`."""

    def __init__(self, ready: Callable[[int], None]) -> None:
        self.ready = ready


class Caller:
    """One connection from this machine. Until a worker is known to have opened it, nothing is read from it."""

    def __init__(self, sock: socket.socket, address: Address, selector: selectors.BaseSelector) -> None:
        sock.setblocking(False)
        self.socket, self.address, self._selector = sock, address, selector
        self.began = self.due = time.monotonic()
        self.number = -1
        self.ready: Ready | None = None
        self.held = False
        """It is not read, as the store cannot take more."""
        self.foretold = (b"", b"")
        """What it may send next, and the answer to that, which the store has sent already."""
        self._unsent = bytearray()
        self._events = 0

    @property
    def gone(self) -> bool:
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def receive(self) -> bytes | None:
        """Return what has arrived: b"" at the end, None if nothing has."""
        try:
            return self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def send(self, data: bytes) -> None:
        """Send what the socket takes now, and the rest when it can."""
        self._unsent += data
        try:
            del self._unsent[: self.socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # reading it will say that it has gone
        self.watch()

    def watch(self) -> None:
        """Have the selector report what this connection waits for."""
        read = not self.held and len(self._unsent) < PENDING_BYTES
        events = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if self._unsent else 0)
        if events == self._events:
            return
        if not events:
            self._selector.unregister(self.socket)
        else:
            (self._selector.modify if self._events else self._selector.register)(self.socket, events, self.ready)
        self._events = events

    def close(self) -> None:
        if self._events:
            self._selector.unregister(self.socket)
            self._events = 0
        self.socket.close()
