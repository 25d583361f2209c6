"""The store in which the nodes of a run meet: a process of its own, so that any node may die.

    python -P -m keepwarm.launch.node.store RUN_FOLDER --number N --host ADDRESS --peer-timeout SECONDS
                                            --opener ADDRESS:PORT

It holds the table of slots, tells the nodes when it changes, and notices nodes that die by their heartbeats. Beside it,
a `KeyServer` holds what workers exchange to connect. Nothing that must survive lies only here: the supervisor that
opens a store gives it the last table that it knew. Nothing that arrives ends it, and no file is needed for its work.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from keepwarm.ft.transport.descriptors import raise_limit
from keepwarm.launch.node import record as node_record
from keepwarm.launch.node import slot_table
from keepwarm.launch.node.connections import Connection, Server, ask, packed, run_secret
from keepwarm.launch.node.heartbeat import FAREWELL, HEARTBEAT, MOVED
from keepwarm.launch.node.key_store.server import KeyServer
from keepwarm.launch.node.peers import FirstTable, Opened
from keepwarm.launch.node.record import SideWrites, StoreRecord
from keepwarm.launch.node.shared_table import Answer, Hello, Refused, Request, Standing, Update, apply, news, stand
from keepwarm.launch.node.slot_table import FIRST_GRACE_S, Table
from keepwarm.launch.node.view import Number, name_of
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.monitor import events

CLOCK_INTERVAL_S = 0.05
"""How often the server checks for silent connections."""
LEASE_S = 30.0
"""How long the server runs without a connection, while nodes may come back or join."""
NEXT_GRACE_S = 3.0
"""How long at least nodes of the previous store may take to come to this one."""
URGENT_INTERVAL_S = 0.02
"""At least this long between two tables that are sent to all; a node's own request is answered at once."""
IDLE_INTERVAL_S = 1.0
"""The same for changes that no node waits for, such as one more arrival."""
OPENER_TIMEOUT_S = 10.0


class TableServer:
    """Applies the requests of nodes to the table, and takes nodes out that have died. Runs on one thread."""

    def __init__(
        self, secret: bytes, host: str, peer_timeout: float, *, on_lost: Callable[[str, str, int], None],
        claim: Callable[[Number, Callable[[], None]], None],
    ) -> None:  # fmt: skip
        """Begin to listen.

        Args:
            secret: of the run; nothing is taken from those that do not know it.
            host: address to listen on.
            peer_timeout: seconds of silence after which a node is considered dead.
            on_lost: called with name, cause and slot of an owner that was taken out.
            claim: claims the view after one for this store, without waiting, and calls a function if that succeeds.
        """
        self._peer_timeout, self._on_lost, self._claim = peer_timeout, on_lost, claim
        self._server = Server(secret, host, self._on_message, self._on_closed)
        self.port = self._server.port
        self.table = Table(slots=1, max_restarts=0)
        self._version = self._sent = 0
        self._urgent = self._claimed = False
        self._claiming: Number | None = None
        self._pushed_at = 0.0
        self._requests = msgspec.json.Decoder(Hello | Standing | Request)
        self._farewell = False
        """The last that a node has done is to leave the run."""
        self._unanswered = set[Connection]()
        """Those whose heartbeats have just been read."""
        self._away = set[str]()
        """Nodes that have neither left the run nor died, as far as is known, and are not connected."""

    def run(self, table: Table, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Serve a first table until the run has ended, its last node has left, or none is connected for `LEASE_S`."""
        self.table = table
        self._began = needed = before = checked = time.monotonic()
        while not stop():
            self._server.turn(CLOCK_INTERVAL_S)
            self._answer()
            now = time.monotonic()
            if now - before > max(self._peer_timeout / 2, 10 * CLOCK_INTERVAL_S):
                # This process itself was held up: heartbeats that arrived meanwhile are still unread.
                for connection in self._server.connections.values():
                    connection.last_heard = now
            before = now
            self._push(now)
            if now - checked < CLOCK_INTERVAL_S:
                continue
            checked = now
            self._find_silent(now)
            self._decide(now)
            if any(connection.heartbeat for connection in self._server.connections.values()):
                needed = now
            elif now - needed > LEASE_S or self.table.ended is not None or self._all_left:
                break
        self._server.stop()

    @property
    def _all_left(self) -> bool:
        """Whether the last node has said that it leaves the run, and none can come back."""
        return self._farewell and not self._away and not self.table.absent

    # ---- what arrives

    def _on_message(self, connection: Connection, body: bytes) -> None:
        if connection.heartbeat:
            self._on_heartbeat(connection, body)
            return
        message = self._requests.decode(body)
        if isinstance(message, Standing):
            self._server.send(connection, stand(self.table))
        elif isinstance(message, Hello):
            connection.node, connection.heartbeat = message.node, message.heartbeat
            connection.version = self._version
            if message.heartbeat:
                self._farewell = False
                self._away.discard(message.node)
            self._server.send(connection, HEARTBEAT if message.heartbeat else Update(self.table))
        elif not connection.node:
            raise ValueError("a request before the greeting")
        else:
            self._on_request(connection, message)

    def _answer(self) -> None:
        """Answer heartbeats, after everything that has arrived was read.

        An answer to a node that has closed its connection fails, and the last that it said would be lost with it: once
        this process is no longer frozen, nodes that went to another store would count as dead, and it would decide.
        """
        unanswered, self._unanswered = self._unanswered, set()
        for connection in unanswered:
            if connection.link in self._server.connections:
                self._server.send(connection, HEARTBEAT)

    def _on_heartbeat(self, connection: Connection, body: bytes) -> None:
        if body == HEARTBEAT:
            self._unanswered.add(connection)
        elif body == FAREWELL:
            connection.node, self._farewell = "", True
            self._server.close(connection)
        elif body == MOVED:
            connection.moved = True

    def _on_request(self, connection: Connection, request: Request) -> None:
        before, refused = self.table, ""
        try:
            self._become(apply(before, connection.node, request.change, time.time()))
        except Refused as error:
            refused = str(error)
        answer = Answer(number=request.number, changed=self.table != before, refused=refused)
        if connection.version < self._version:
            connection.version = self._version
            self._server.send(connection, Update(self.table))
        self._server.send(connection, answer)

    # ---- nodes that die

    def _on_closed(self, connection: Connection) -> None:
        if connection.heartbeat and connection.node:
            self._farewell = False
            if connection.moved:
                self._away.add(connection.node)
            cause = "it left for another store" if connection.moved else "its supervisor has gone"
            self._lose(connection.node, cause, dead=not connection.moved, failed=not connection.moved)

    def _find_silent(self, now: float) -> None:
        for connection in list(self._server.connections.values()):
            if connection.heartbeat and now - connection.last_heard > self._peer_timeout:
                node, connection.node = connection.node, ""
                self._away.add(node)
                self._server.close(connection)
                cause = f"no heartbeat for {self._peer_timeout:g} s"
                self._lose(node, cause, silence=self._peer_timeout)

    def _lose(
        self, node: str, cause: str, *, silence: float = 0.0, dead: bool = False, failed: bool = True
    ) -> None:  # fmt: skip
        """Take a node out. One that has not `failed` is part of the run elsewhere, which has other events."""
        if any(other.heartbeat and other.node == node for other in self._server.connections.values()):
            return  # it has connected again
        slot = self.table.slot_of(node)
        text = f"{name_of(node)}: {cause}"
        changed = self._become(slot_table.lose(self.table, node, text, time.time(), silence=silence, dead=dead))
        if changed and slot is not None and failed:
            self._on_lost(name_of(node), cause, slot)

    def _decide(self, now: float) -> None:
        """Do what no node asks for: give up nodes that did not follow, fill vacant slots, claim the next view."""
        table, waited = self.table, now - self._began
        for node in table.absent:
            if node in table.dead:
                self._lose(node, "its supervisor has gone", dead=True)
            elif waited > max(NEXT_GRACE_S, self._peer_timeout) and table.decides:
                self._lose(node, f"it did not come to store {table.store}", silence=self._peer_timeout)
        if self.table.vacant and self.table.spares and (self.table.begun or waited > FIRST_GRACE_S):
            self._become(slot_table.fill(self.table))
        if self._claimed:
            self._claimed = False
            self._become(slot_table.claim(self.table))
        view = self.table.view
        if view is not None and slot_table.needs_claim(self.table) and self._claiming != view.number:
            self._claiming = view.number
            self._claim(view.number, self._on_claimed)

    def _on_claimed(self) -> None:
        """Called from any thread."""
        self._claimed = True

    # ---- the table

    def _become(self, after: Table) -> bool:
        before = self.table
        if after == before:
            return False
        self.table = after
        self._version += 1
        self._urgent = self._urgent or news(before) != news(after)
        return True

    def _push(self, now: float) -> None:
        """Send the table to the nodes that have an older one."""
        if self._sent == self._version:
            return
        if now - self._pushed_at < (URGENT_INTERVAL_S if self._urgent else IDLE_INTERVAL_S):
            return
        self._pushed_at, self._urgent, behind = now, False, False
        update = packed(Update(self.table))
        for connection in list(self._server.connections.values()):
            if connection.heartbeat or not connection.node or connection.version == self._version:
                continue
            if connection.behind:
                behind = True  # it gets the next table that there is when it can take one
                continue
            connection.version = self._version
            self._server.send(connection, update)
        if not behind:
            self._sent = self._version


def main(arguments: Sequence[str]) -> None:
    """Open a store, tell its opener the address, and serve until no supervisor needs it."""
    # Batch systems signal every process of a job. Supervisors act on that, and need their store meanwhile.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -P -m keepwarm.launch.node.store", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--peer-timeout", type=float, required=True)
    parser.add_argument("--opener", required=True)
    given = parser.parse_args(arguments)
    raise_limit()
    side, folder, secret = SideWrites(), given.folder, run_secret(given.folder)

    def on_lost(node: str, cause: str, slot: int) -> None:
        side.put(lambda: events.append(folder, events.Failure(node=node, kind="lost", cause=cause, slots=(slot,))))

    def claim(view: Number, on_claimed: Callable[[], None]) -> None:
        side.put(lambda: on_claimed() if node_record.claim_view(folder, view, f"store {given.number}") else None)

    server = TableServer(secret, given.host, given.peer_timeout, on_lost=on_lost, claim=claim)
    keys = KeyServer(secret, given.host)
    record = StoreRecord(
        number=given.number, pid=os.getpid(), host=given.host, port=keys.port, heartbeat_port=server.port
    )
    host, _, opener = given.opener.rpartition(":")
    answer = ask(secret, (host, int(opener)), Opened(record=record), OPENER_TIMEOUT_S)
    if isinstance(answer, str):
        sys.exit(f"keepwarm: store {given.number}: the supervisor at {given.opener} that opens it is {answer}")
    side.put(lambda: node_record.write_store(folder, record))
    side.put(lambda: node_record.redirect_output(RunFolder(folder).nodes / f"store-{given.number}.log"))
    server.run(msgspec.json.decode(answer, type=FirstTable).table)
    keys.close()
    side.close()


if __name__ == "__main__":
    main(sys.argv[1:])
