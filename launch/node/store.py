"""The store in which the nodes of a run meet: a `TCPStore` in a process of its own, so that any node may die.

It holds the table of `keepwarm.launch.node.slot_table`, under one key that is changed by compare-and-set, and what
workers exchange to connect. Beside it the process runs a desk: each supervisor keeps a connection to it and sends a
sign of life a few times a second. A connection that closes is a death at once, silence is one after a while; the desk
then takes the node out of the table. Nothing that must survive lies only here: when the process dies, whoever creates
`store-<n>.claim` in the run folder opens the next one, and the supervisors fill it with what they know.
"""

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
from torch._C._distributed_c10d import TCPStore

from keepwarm.launch.forkserver import StoreOrder
from keepwarm.launch.node import record as node_record
from keepwarm.launch.node import slot_table
from keepwarm.launch.node.record import StoreRecord
from keepwarm.launch.node.slot_table import Table
from keepwarm.trainer.monitor import events

KEY = "keepwarm/table"
TURN = 0.05
"""Seconds between two looks at the clock."""
LEASE = 30.0
"""Seconds that a store stays when nobody is connected."""
NAME_LIMIT = 256
BEAT, FAREWELL = b".", b"!"


def change(store: TCPStore, first: Table, step: Callable[[Table], Table]) -> tuple[Table, bool]:
    """Replace the table by what `step` makes of it, however often others are faster; (table, whether it changed).

    `first` is the table of a store that has none.
    """
    text = store.get(KEY).decode() if store.check([KEY]) else ""
    while True:
        table = msgspec.json.decode(text, type=Table) if text else first
        after = step(table)
        if after == table:
            return table, False
        wanted = msgspec.json.encode(after).decode()
        text = store.compare_set(KEY, text, wanted).decode()
        if text == wanted:
            return after, True


def read(store: TCPStore) -> Table | None:
    """The table; None before anyone has joined."""
    return msgspec.json.decode(store.get(KEY), type=Table) if store.check([KEY]) else None


def serve(order: StoreOrder) -> None:
    """Open the store, say where, and look after it until nobody needs it.

    Batch systems signal every process of a job: supervisors act on that, and need their store meanwhile.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    listener = socket.create_server((order.host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        order.host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(),
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    desk = Desk(store, order)
    record = StoreRecord(
        number=order.number, pid=os.getpid(), host=order.host, port=port, desk=desk.port, by=order.node
    )
    node_record.write_store(Path(order.folder), record)
    desk.run()


class _Guest(msgspec.Struct):
    """A supervisor at the desk."""

    connection: socket.socket
    heard: float
    name: str = ""
    words: bytes = b""


class Desk:
    """Knows who lives; see the module."""

    def __init__(self, store: TCPStore, order: StoreOrder) -> None:
        self._store, self._order = store, order
        self._folder = Path(order.folder)
        self._listener = socket.create_server((order.host, 0), backlog=4096)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._guests: dict[int, _Guest] = {}
        self.port: int = self._listener.getsockname()[1]

    def run(self) -> None:
        needed = before = time.monotonic()
        while True:
            for key, _ in self._selector.select(TURN):
                self._accept() if key.data is None else self._hear(key.data)
            now = time.monotonic()
            if now - before > max(self._order.silence / 2, 10 * TURN):
                # This process was held up itself: what the others said meanwhile has still to be read.
                for guest in self._guests.values():
                    guest.heard = now
            before = now
            for guest in list(self._guests.values()):
                if now - guest.heard > self._order.silence:
                    self._lose(guest, f"no sign of life for {self._order.silence:g} s", self._order.silence)
            if self._guests:
                needed = now
            elif now - needed > LEASE or self._superfluous():
                return

    def _superfluous(self) -> bool:
        table = read(self._store)
        ended = table is not None and table.ended is not None
        return ended or node_record.newest_claim(self._folder) > self._order.number

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            guest = _Guest(connection, time.monotonic())
            self._guests[connection.fileno()] = guest
            self._selector.register(connection, selectors.EVENT_READ, guest)

    def _hear(self, guest: _Guest) -> None:
        try:
            said = guest.connection.recv(NAME_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            self._lose(guest, "its supervisor has gone")
            return
        guest.heard = time.monotonic()
        if not guest.name:
            guest.words += said
            name, found, said = guest.words.partition(b"\n")
            if not found:
                if len(guest.words) > NAME_LIMIT:
                    self._forget(guest)
                return
            guest.name = name.decode(errors="replace")
            said = said or BEAT
        if FAREWELL in said:
            self._forget(guest)
            return
        with contextlib.suppress(OSError):
            guest.connection.send(BEAT)

    def _lose(self, guest: _Guest, cause: str, silence: float = 0.0) -> None:
        self._forget(guest)
        again = any(other.name == guest.name for other in self._guests.values())
        if not guest.name or again:
            return
        slot: list[int | None] = [None]

        def lost(table: Table) -> Table:
            slot[0] = table.slot_of(guest.name)
            return slot_table.lose(table, guest.name, f"{guest.name}: {cause}", time.time(), silence=silence)

        first = Table(slots=1, max_restarts=0)
        if read(self._store) is not None and change(self._store, first, lost)[1] and slot[0] is not None:
            events.append(self._folder, events.Failure(node=guest.name, kind="lost", cause=cause, slots=(slot[0],)))

    def _forget(self, guest: _Guest) -> None:
        self._guests.pop(guest.connection.fileno(), None)
        self._selector.unregister(guest.connection)
        guest.connection.close()
