"""What supervisors ask one another without a store: for votes, for the store that they follow, and to follow a new one.

Each supervisor listens at an address that every view carries. The thread that answers touches no file.
"""

import contextlib
import queue
import threading
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from keepwarm.launch.node.connections import Address, Connection, Server, ask, exchange
from keepwarm.launch.node.record import StoreRecord
from keepwarm.launch.node.shared_table import Stand, Standing
from keepwarm.launch.node.slot_table import Table
from keepwarm.launch.node.view import Ballot, Member, Vote, Voter, tally

CONNECT_TIMEOUT_S = 1.5
"""How long a node waits for another one's answer: a cut-off machine gives none."""


class Where(msgspec.Struct, frozen=True, tag=True):
    """Asks a supervisor which store it follows."""


class Here(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    node: str
    store: StoreRecord | None
    elects: bool = False
    """It knows a view, whose owners open the next store."""


class Announcement(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The opener of a store asks the others to follow it."""

    store: StoreRecord


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A store tells the supervisor that opens it where it listens."""

    record: StoreRecord


class FirstTable(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: the store's first table."""

    table: Table


class Template(msgspec.Struct, frozen=True, tag=True):
    """Asks a supervisor for the configuration from which it starts its agent."""


class Configured(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer: empty if it knows none."""

    template: bytes


class PeerListener:
    """Answers the other supervisors, on a thread of its own."""

    def __init__(self, secret: bytes, host: str, node: str) -> None:
        self.secret, self._lock = secret, threading.RLock()
        self._voter = Voter(node=node)
        self._following: StoreRecord | None = None
        self._announced: StoreRecord | None = None
        self._first_tables: dict[int, Table] = {}
        self._opened: queue.SimpleQueue[StoreRecord] = queue.SimpleQueue()
        self.template = b""
        """The configuration of this node's agent, for nodes that cannot read it."""
        self._decoder = msgspec.json.Decoder(Ballot | Where | Announcement | Opened | Template)
        self._stop = False
        self._server = Server(secret, host, self._on_message, lambda _: None)
        self.port = self._server.port
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop = True
        self._thread.join(5.0)

    # ---- for the supervisor

    @property
    def voter(self) -> Voter:
        """Return a copy of what this node has promised and accepted."""
        with self._lock:
            return msgspec.structs.replace(self._voter)

    def learn(self, table: Table) -> None:
        """Note the view that is installed in a table."""
        with self._lock:
            self._voter.learn(table.view)

    def accept(self, table: Table) -> None:
        """Accept the owners in a table."""
        with self._lock:
            self._voter.accept(table.proposed)

    def follow(self, store: StoreRecord | None) -> None:
        """Note the store that this node follows; None while it looks for one."""
        with self._lock:
            self._following, self._voter.follows = store, store is not None

    @property
    def announced(self) -> StoreRecord | None:
        """The newest store that a supervisor has announced to this one; by any of them."""
        with self._lock:
            return self._announced

    def hear_of(self, store: StoreRecord) -> None:
        """Note a store that others follow, as if it had been announced to this node."""
        with self._lock:
            if self._announced is None or store.number >= self._announced.number:
                self._announced = store

    def candidacy(self, above: int) -> Ballot | None:
        """Vote for this node itself: see `Voter.stand`."""
        with self._lock:
            return self._voter.stand(above)

    def expect(self, number: int, table: Table) -> None:
        """Give `table` to the store with this number when it has opened."""
        with self._lock:
            self._first_tables = {number: table}

    def opened(self, number: int, timeout: float) -> StoreRecord | None:
        """Wait until the store with this number has opened; return None if it did not."""
        try:
            while (record := self._opened.get(timeout=timeout)).number != number:
                pass
        except queue.Empty:
            return None
        return record

    # ---- on the thread

    def _run(self) -> None:
        while not self._stop:
            self._server.turn(0.1)
        self._server.stop()

    def _on_message(self, connection: Connection, body: bytes) -> None:
        message = self._decoder.decode(body)
        with self._lock:
            answer = self._answer(message)
        self._server.send(connection, answer)

    def _answer(
        self, message: Ballot | Where | Announcement | Opened | Template
    ) -> Vote | Here | FirstTable | Configured:
        if isinstance(message, Template):
            return Configured(template=self.template)
        if isinstance(message, Ballot):
            return self._voter.vote(message)
        if isinstance(message, Opened):
            table = self._first_tables.pop(message.record.number)
            self._opened.put(message.record)
            return FirstTable(table=table)
        if isinstance(message, Announcement):
            self.hear_of(message.store)
        return Here(node=self._voter.node, store=self._following, elects=self._voter.installed is not None)


# ---- asking


def _addresses(members: Mapping[str, Member], me: str) -> dict[str, Address]:
    return {node: (member.host, member.port) for node, member in members.items() if node != me}


def collect_votes(
    secret: bytes, ballot: Ballot, members: Mapping[str, Member], voter: Voter
) -> dict[str, Vote | Literal["dead", "silent"]]:
    """Ask the owners of all views that count for their votes; stop once these decide.

    An owner is dead if its machine says that no process listens at its address, or if another one answers there.
    """
    me = voter.node

    def read(answers: Mapping[str, bytes | str]) -> dict[str, Vote | Literal["dead", "silent"]]:
        return {node: _vote(node, answer) for node, answer in answers.items()}

    answers = exchange(
        secret, _addresses(members, me), ballot, CONNECT_TIMEOUT_S,
        enough=lambda found: tally(voter.views, read(found), me) == "go",
    )  # fmt: skip
    return read(answers)


def _vote(node: str, answer: bytes | str) -> Vote | Literal["dead", "silent"]:
    if isinstance(answer, str):
        return "dead" if answer == "refused" else "silent"
    try:
        vote = msgspec.json.decode(answer, type=Vote)
    except msgspec.DecodeError:
        return "silent"
    return vote if vote.node == node else "dead"


def announce(secret: bytes, store: StoreRecord, members: Mapping[str, Member], me: str) -> None:
    """Ask all nodes to follow a store."""
    exchange(secret, _addresses(members, me), Announcement(store=store), CONNECT_TIMEOUT_S)


def stores_of(secret: bytes, addresses: Mapping[str, Address]) -> tuple[list[StoreRecord], dict[str, str]]:
    """Return the stores that supervisors follow, and for those that follow none why.

    `elects`: it is one of the nodes that open the next one; `looks`: it has just started; `refused`; `silent`.
    """
    found: list[StoreRecord] = []
    others: dict[str, str] = {}
    for node, answer in exchange(secret, addresses, Where(), CONNECT_TIMEOUT_S).items():
        if isinstance(answer, str):
            others[node] = answer
            continue
        try:
            here = msgspec.json.decode(answer, type=Here)
        except msgspec.DecodeError:
            others[node] = "silent"
            continue
        if here.store is None:
            others[node] = "elects" if here.elects else "looks"
        else:
            found.append(here.store)
    return found, others


def template_of(secret: bytes, members: Mapping[str, Member], me: str) -> bytes:
    """Return the configuration of agents that another supervisor knows; empty if none does or answers."""
    answers = exchange(
        secret, _addresses(members, me), Template(), CONNECT_TIMEOUT_S,
        enough=lambda found: any(map(_template, found.values())),
    )  # fmt: skip
    return next(filter(None, map(_template, answers.values())), b"")


def _template(answer: bytes | str) -> bytes:
    with contextlib.suppress(msgspec.DecodeError):
        return b"" if isinstance(answer, str) else msgspec.json.decode(answer, type=Configured).template
    return b""


def stands_of(secret: bytes, stores: Iterable[StoreRecord]) -> list[tuple[Stand, StoreRecord]]:
    """Return what those of the stores that answer are followed for."""
    asked = dict(enumerate(stores))
    addresses = {key: (store.host, store.heartbeat_port) for key, store in asked.items()}
    answers = exchange(secret, addresses, Standing(), CONNECT_TIMEOUT_S)
    return [(stand, asked[key]) for key, answer in answers.items() if isinstance(stand := _stand(answer), Stand)]


def stand_of(secret: bytes, store: StoreRecord) -> Stand | str:
    """Return what a store is followed for, or why it does not answer: `refused` or `silent`."""
    return _stand(ask(secret, (store.host, store.heartbeat_port), Standing(), CONNECT_TIMEOUT_S))


def _stand(answer: bytes | str) -> Stand | str:
    if isinstance(answer, str):
        return answer
    try:
        return msgspec.json.decode(answer, type=Stand)
    except msgspec.DecodeError:
        return "silent"
