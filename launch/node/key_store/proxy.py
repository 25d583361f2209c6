"""A node's way to the store for its workers: torch's client connects to this process, and no other process gets in.

torch's `TCPStore` proves nothing and checks nothing, so it talks to a loopback address of its own machine alone. Here
the supervisor looks which process has connected, and passes the bytes of its workers on to the store over a link that
is authenticated (`keepwarm.launch.node.key_store.server` has the format).
"""

import contextlib
import itertools
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection

from keepwarm.exit_code import ExitCode
from keepwarm.ft.protocol.messages import Wire
from keepwarm.ft.transport.link import Link
from keepwarm.ft.transport.listener import Listener
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.node.connections import Address, Body, Events, dialled, packed
from keepwarm.launch.node.key_store.caller import Caller, Ready
from keepwarm.launch.node.key_store.local_peer import holds, listen
from keepwarm.launch.node.key_store.server import (
    CHUNK_BYTES,
    FORETOLD,
    PENDING_BYTES,
    Opening,
    entries,
    entry,
    foretold,
)
from keepwarm.launch.node.options import LOOPBACK

UNKNOWN = 512
"""Connections that may wait until it is known whose they are."""
ACCEPTED_AT_ONCE = 64
IDENTIFY_S = 2.0
"""How long a connection may be unidentified: a worker may connect before its supervisor hears that it has started."""
LOOK_INTERVAL_S = 0.002
"""At least this long between two looks at the machine's connections."""
CONNECT_TIMEOUT_S = 1.5
RETRY_INTERVAL_S = 1.0
REFUSALS_INTERVAL_S = 10.0
TURN_S = 0.1


class NoLoopback(LaunchError):
    """Workers cannot reach the store through this process."""

    exit_code = ExitCode.UNRECOVERABLE


class StoreProxy(Events):
    """Passes on what workers ask of the store, on a thread of its own. Nothing that arrives ends it."""

    def __init__(self, secret: bytes, node: str, workers: Callable[[], Collection[int]]) -> None:
        """Begin to listen.

        Args:
            secret: of the run.
            node: this supervisor.
            workers: returns the pids of the workers that may use the store; called on the thread.

        Raises:
            NoLoopback: this machine has no loopback interface, or does not tell which process has connected.
        """
        self._secret, self._node, self._workers = secret, node, workers
        try:
            sock, self._inodes = listen()
        except OSError as error:
            raise NoLoopback(f"{node}: workers cannot reach the store through {LOOPBACK}: {error}") from error
        self._selector = selectors.DefaultSelector()
        self._address: Address = sock.getsockname()
        self.port: int = self._address[1]
        self._listener = Listener(sock, self._selector, Ready(self._accept))
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, Ready(self._on_woken))
        self._orders: queue.SimpleQueue[tuple[Address, int] | None] = queue.SimpleQueue()
        self._unknown: dict[Caller, None] = {}
        self._callers: dict[int, Caller] = {}
        self._numbers, self._said = itertools.count(), bytearray()
        self._target: tuple[Address, int] | None = None
        self._store: Link | None = None
        self._stopped = self._holding = False
        self._refusals = 0
        self._looked_at = self._tried_at = self._refusals_at = 0.0
        self._thread = threading.Thread(target=self._run, name="store-proxy", daemon=True)
        self._thread.start()

    def open(self, store: Address, start: int) -> None:
        """From now on pass on to this store, for the workers of this start; connections of earlier ones are closed."""
        self._order((store, start))

    def close(self) -> None:
        self._order(None)
        self._thread.join(5.0)

    def _order(self, order: tuple[Address, int] | None) -> None:
        self._orders.put(order)
        self._wake.send(b"\0")

    # ---- the thread

    def _run(self) -> None:
        while not self._stopped:
            for key, mask in self._selector.select(self._pause()):
                key.data.ready(mask)
            while not self._orders.empty():
                self._obey(self._orders.get())
            self._listener.tick()
            if self._store is not None:
                self._store.tick(time.monotonic())
            self._identify()
            self._tell()
        for caller in list(self._unknown):
            self._drop(caller)
        self._listener.close()
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def _pause(self) -> float:
        """Return how long nothing has to be done unless something arrives."""
        due = min((caller.due for caller in self._unknown), default=time.monotonic() + TURN_S)
        return min(TURN_S, max(0.0, max(due, self._looked_at + LOOK_INTERVAL_S) - time.monotonic()))

    def _on_woken(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(64)

    def _obey(self, order: tuple[Address, int] | None) -> None:
        self._target = None
        if self._store is not None:
            self._store.close("a later start begins")
        self._target, self._stopped = order, order is None
        self._tried_at = 0.0
        self._connect()

    # ---- connections of this machine

    def _accept(self, mask: int) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            shed = self._listener.shed
            accepted = self._listener.accept()
            if accepted is None:
                if self._listener.shed > shed and self._unknown:
                    self._refuse(next(iter(self._unknown)))
                return
            caller = Caller(*accepted, self._selector)
            self._unknown[caller] = None
            if len(self._unknown) > UNKNOWN:
                self._refuse(next(iter(self._unknown)))

    def _identify(self) -> None:
        """Take in the connections of workers, and refuse those that have been unidentified for too long."""
        now = time.monotonic()
        due = [caller for caller in self._unknown if caller.due <= now]
        if not due or now - self._looked_at < LOOK_INTERVAL_S:
            return
        self._looked_at = now
        try:
            inodes = self._inodes([caller.address for caller in due], self._address)
        except OSError:
            inodes = {}
        pids = self._workers()
        for caller in due:
            inode = inodes.get(caller.address)
            known = inode is not None and holds(pids, inode)
            if known and self._connected():
                self._admit(caller)
            elif caller.gone or (known and now - caller.began > IDENTIFY_S):
                self._drop(caller)  # torch's client tries again, should there be a store by then
            elif now - caller.began > IDENTIFY_S:
                self._refuse(caller)
            else:
                caller.due = now + max(LOOK_INTERVAL_S, (now - caller.began) / 4)

    def _admit(self, caller: Caller) -> None:
        del self._unknown[caller]
        with contextlib.suppress(OSError):
            caller.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        caller.number = next(self._numbers) % FORETOLD
        self._callers[caller.number] = caller
        caller.ready = Ready(lambda mask: self._on_caller(caller, mask))
        caller.watch()
        self._on_caller(caller, selectors.EVENT_READ)

    def _refuse(self, caller: Caller) -> None:
        self._drop(caller)
        self._refusals += 1
        now = time.monotonic()
        if now - self._refusals_at > REFUSALS_INTERVAL_S:
            self._say(f"refused {self._refusals} connections to port {self.port}, which no worker of this node opened")
            self._refusals, self._refusals_at = 0, now

    def _on_caller(self, caller: Caller, mask: int) -> None:
        if self._callers.get(caller.number) is not caller:
            return  # closed since the selector reported it
        if mask & selectors.EVENT_WRITE:
            caller.send(b"")
        if not mask & selectors.EVENT_READ or (data := caller.receive()) is None:
            return
        request, answer = caller.foretold
        caller.foretold = (b"", b"")
        if data and data == request:
            caller.send(answer)
            return
        self._said += entry(caller.number, data)
        if not data:
            self._drop(caller)
        if len(self._said) > CHUNK_BYTES:
            self._tell()

    def _hold(self, *, held: bool) -> None:
        self._holding = held
        for caller in self._callers.values():
            caller.held = held
            caller.watch()

    def _drop(self, caller: Caller) -> None:
        self._unknown.pop(caller, None)
        self._callers.pop(caller.number, None)
        caller.close()

    # ---- the store

    def _connected(self) -> bool:
        """Return whether there is a connection to the store; begin to open one now and then if there is none."""
        if self._store is None and time.monotonic() - self._tried_at > RETRY_INTERVAL_S:
            self._connect()
        return self._store is not None and self._store.open

    def _connect(self) -> None:
        if self._target is None:
            return
        address, _ = self._target
        self._tried_at = time.monotonic()
        try:
            stream = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
            self._store = dialled(self._secret, stream, address, self._selector, self)
        except OSError as error:
            self._say(f"the store of the workers' keys at {address[0]}:{address[1]} cannot be reached: {error}")

    def _tell(self) -> None:
        """Pass on what workers have said in this turn."""
        if not self._said:
            return
        message, self._said = bytes(self._said), bytearray()
        if self._store is not None:
            self._store.post(Body(data=message))
        if self._store is not None and self._store.channel.pending > PENDING_BYTES:
            self._hold(held=True)

    def connected(self, link: Link) -> None:
        assert self._target is not None
        link.post(Body(data=packed(Opening(node=self._node, start=self._target[1]))))

    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None:
        assert isinstance(message, Body)
        try:
            for number, data in entries(message.data):
                self._pass_on(number, data)
        except ValueError as error:
            link.close(str(error))

    def _pass_on(self, number: int, data: bytes) -> None:
        caller = self._callers.get(number & ~FORETOLD)
        if caller is None:
            return
        if number & FORETOLD:
            caller.foretold = foretold(data)
        elif data:
            caller.send(data)
        else:
            self._drop(caller)

    def drained(self, link: Link) -> None:
        if self._holding:
            self._hold(held=False)

    def refused(self, link: Link, reason: str) -> None:
        self._store = None
        if self._target is not None:
            self._say(f"the store of the workers' keys at {link.label} cannot be reached: {reason}")

    def lost(self, link: Link, reason: str) -> None:
        """Close the connections of the workers too, so that they see it."""
        self._store, self._holding = None, False
        self._said.clear()
        if self._target is not None and self._callers:
            self._say(f"the connection to the store of the workers' keys was lost: {reason}")
        for caller in list(self._callers.values()):
            self._drop(caller)

    def _say(self, text: str) -> None:
        print(f"keepwarm: {self._node}: {text}", file=sys.stderr)
