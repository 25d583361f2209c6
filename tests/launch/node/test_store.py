"""The store and the link of a node to it, over real sockets: what arrives, how much, and what a node outlives."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keepwarm.files import within
from keepwarm.launch.node import record as node_record
from keepwarm.launch.node import slot_table
from keepwarm.launch.node.connections import Dialled, Server, ask, run_secret
from keepwarm.launch.node.heartbeat import HEARTBEAT, MOVED, Heartbeat
from keepwarm.launch.node.membership import ChangeRefused, Membership
from keepwarm.launch.node.peers import PeerListener, stand_of, stores_of
from keepwarm.launch.node.record import SideWrites, StoreRecord
from keepwarm.launch.node.shared_table import (
    Answer,
    Arrive,
    End,
    Fail,
    GiveUp,
    Hello,
    Join,
    Request,
    Stand,
    Standing,
    Update,
)
from keepwarm.launch.node.slot_table import Known, Table
from keepwarm.launch.node.store import TableServer
from keepwarm.launch.node.view import Member, View, identity

DEADLINE = 60.0
PEER_TIMEOUT = 5.0


class Served:
    """A table server on a thread, and nodes that are connected to it."""

    def __init__(self, folder: Path, table: Table, number: int = 0) -> None:
        self.folder, self.lost = folder, list[str]()
        self.server = TableServer(
            run_secret(folder), "127.0.0.1", PEER_TIMEOUT, on_lost=lambda node, cause, slot: self.lost.append(node),
            claim=lambda view, done: None,
        )  # fmt: skip
        self.record = StoreRecord(
            number=number, pid=os.getpid(), host="127.0.0.1", port=1, heartbeat_port=self.server.port
        )
        self.stopped = False
        self.thread = threading.Thread(target=self.server.run, args=(table,), kwargs={"stop": lambda: self.stopped})
        self.thread.start()
        self.closing: list[Callable[[], None]] = []

    def node(self, name: str, start: str = "1") -> Membership:
        """A link of a node, as a supervisor has it."""
        node = identity(name, start)
        peers = PeerListener(run_secret(self.folder), "127.0.0.1", node)
        me = Member(node=node, host="127.0.0.1", port=peers.port)
        opened: Callable[[int], None] = lambda number: pytest.fail(f"{name} opens store {number}")  # noqa: E731
        membership = Membership(
            self.folder, me, Table(slots=1, max_restarts=0), peer_timeout=PEER_TIMEOUT, peers=peers, open_store=opened
        )
        membership.enter()
        self.closing += [lambda: membership.leave(farewell=True), peers.close]
        return membership

    def dial(self) -> Dialled:
        """A connection of a process that knows the secret."""
        address = "127.0.0.1", self.server.port
        return Dialled(run_secret(self.folder), address, connect_timeout=DEADLINE, timeout=DEADLINE)

    def join(self, membership: Membership, slot: Any = "any") -> None:
        membership.change(Join(member=membership.me, requested_slot=slot, known=membership.known(-1)))

    def close(self) -> None:
        for each in self.closing:
            each()
        self.stopped = True
        self.thread.join(DEADLINE)


def until(ready: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE
    while not (found := ready()):
        assert time.monotonic() < end, f"waited {DEADLINE:g} s for {what}"
        time.sleep(0.01)
    return found


def is_closed(connection: Dialled) -> bool:
    try:
        connection.receive(0.1)
    except ConnectionError:
        return True
    return False


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(slots: int = 2, number: int = 0) -> Served:
        served = Served(tmp_path, Table(slots=slots, max_restarts=3), number)
        node_record.claim_store(tmp_path, number)
        node_record.write_store(tmp_path, served.record)
        made.append(served)
        return made[-1]

    yield start
    for each in made:
        each.close()


def start_all(nodes: list[Membership], served: Served) -> None:
    for slot, node in enumerate(nodes):
        served.join(node, slot)
    for node in nodes:
        until(lambda: len(node.read().owners) == len(nodes), "all owners")  # noqa: B023
        table = node.read()
        node.accept(table)
        node.change(Arrive(restart=table.restart, view=table.number))
    for node in nodes:
        until(lambda: node.read().complete, "the first start")  # noqa: B023


@pytest.mark.parametrize("garbage", [b"not json", b"[]", b"{}", b'{"type":"Request","number":1}', b"\xff" * 64])
def test_store_garbage_ends_neither_store_nor_supervisor(serve: Callable[..., Served], garbage: bytes) -> None:
    served = serve()
    nodes = [served.node("n0"), served.node("n1")]
    start_all(nodes, served)
    for greeting in (garbage, Hello(node="x", heartbeat=False)):
        member = served.dial()
        member.send(greeting)
        member.send(garbage)
        until(lambda: is_closed(member), "the connection to be closed")  # noqa: B023
    for node in nodes:
        table, changed = node.change(Fail(restart=0, kind="failed", cause="it broke"))
        assert (table.restart, changed) == (1, True)
    assert served.lost == []


def test_supervisor_without_a_store_says_whether_it_opens_the_next_one(tmp_path: Path) -> None:
    """One that has just started must not take those that elect for the remains of an earlier start."""
    secret = run_secret(tmp_path)
    peers = PeerListener(secret, "127.0.0.1", "n0#1")
    asked = {"n0#1": ("127.0.0.1", peers.port)}
    assert stores_of(secret, asked) == ([], {"n0#1": "looks"})
    member = Member(node="n0#1", host="127.0.0.1", port=peers.port)
    peers.learn(Table(slots=1, max_restarts=0, view=View(number=(0, 1), members={0: member})))
    assert stores_of(secret, asked) == ([], {"n0#1": "elects"})
    peers.close()
    assert stores_of(secret, asked) == ([], {"n0#1": "refused"})


def test_store_that_answers_garbage_is_as_good_as_silent(tmp_path: Path) -> None:
    secret, stopped = run_secret(tmp_path), threading.Event()
    server = Server(secret, "127.0.0.1", lambda connection, _: server.send(connection, b"not json"), lambda _: None)

    def serve() -> None:
        while not stopped.is_set():
            server.turn(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    record = StoreRecord(number=0, pid=1, host="127.0.0.1", port=1, heartbeat_port=server.port)
    assert ask(secret, ("127.0.0.1", server.port), Standing(), DEADLINE) == b"not json"
    assert stand_of(secret, record) == "silent"
    stopped.set()
    thread.join(DEADLINE)
    server.stop()
    assert stand_of(secret, record) == "refused"


def test_second_supervisor_of_a_name_is_refused_until_the_first_has_gone(serve: Callable[..., Served]) -> None:
    served = serve()
    first, other = served.node("gpu-7"), served.node("gpu-8")
    start_all([first, other], served)
    second = served.node("gpu-7", start="2")
    with pytest.raises(ChangeRefused, match="a supervisor of the name gpu-7 is part of the run already"):
        served.join(second, 0)
    assert other.read().owners == {0: first.node, 1: other.node}
    first.change(GiveUp(why="asked to leave"))
    until(lambda: first.node not in other.read().owners.values(), "the first one to be given up")
    served.join(second, 0)
    assert second.read().owners == {0: second.node, 1: other.node}
    assert other.read().slot_of(first.node) is None


def test_heartbeat_of_another_start_does_not_hide_a_death(serve: Callable[..., Served]) -> None:
    """It knows the name of the node, and not the start of its supervisor."""
    served = serve()
    nodes = [served.node("n0"), served.node("n1")]
    start_all(nodes, served)
    record = served.record
    stranger = Heartbeat(run_secret(served.folder), record, identity("n1", "guessed"), PEER_TIMEOUT, 1.0)
    nodes[1].leave(farewell=False)
    until(lambda: nodes[0].read().owners == {0: nodes[0].node}, "n1 to be given up")
    stranger.close(farewell=True)


def test_store_that_was_frozen_reads_who_left_before_it_answers(tmp_path: Path) -> None:
    """Nodes gave signs of life while it was, and then went to another store: they are not dead."""
    lost: list[str] = []
    server = TableServer(
        run_secret(tmp_path), "127.0.0.1", PEER_TIMEOUT, on_lost=lambda node, cause, slot: lost.append(cause),
        claim=lambda view, done: None,
    )  # fmt: skip
    owners = {0: identity("n0", "1"), 1: identity("n1", "1")}
    address, stopped = ("127.0.0.1", server.port), [False]
    running, frozen = threading.Event(), threading.Event()
    running.set()

    def turn(seconds: float, turn: Callable[[float], None] = server._server.turn) -> None:
        if not running.is_set():
            frozen.set()
            running.wait(DEADLINE)
        turn(seconds)

    server._server.turn = turn  # type: ignore[method-assign]
    table = Table(slots=2, max_restarts=3, owners=owners)
    thread = threading.Thread(target=server.run, args=(table,), kwargs={"stop": lambda: stopped[0]})
    thread.start()
    try:
        node = Dialled(run_secret(tmp_path), address, connect_timeout=DEADLINE, timeout=DEADLINE)
        node.send(Hello(node=owners[1], heartbeat=True))
        assert node.receive(DEADLINE) == HEARTBEAT
        running.clear()
        assert frozen.wait(DEADLINE)
        for said in (*[HEARTBEAT] * 20, MOVED):
            node.send(said)
        node.close()
        running.set()
        until(lambda: server.table.owners == {0: owners[0]}, "its slot to be vacant")
    finally:
        stopped[0] = True
        thread.join(DEADLINE)
    assert (lost, server.table.dead) == ([], ())


def test_store_of_a_minority_is_not_followed(serve: Callable[..., Served], tmp_path: Path) -> None:
    """A node that is cut off opens a store beside: its address swallows what it gets, or it answers, alone."""
    served = serve(slots=4)
    nodes = [served.node(f"n{index}") for index in range(4)]
    start_all(nodes, served)
    before = nodes[0].read()
    hole = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = hole.getsockname()[1]
    queued = [socket.socket() for _ in range(3)]
    for one in queued:
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
    node_record.write_store(tmp_path, StoreRecord(number=1, pid=1, host="127.0.0.1", port=port, heartbeat_port=port))
    alone = serve(slots=4, number=2)
    lonely = Member(node=identity("n9", "1"), host="127.0.0.1", port=1)
    link = Heartbeat(run_secret(tmp_path), alone.record, lonely.node, PEER_TIMEOUT, 1.0)
    for node in nodes:
        assert node._best() == served.record
        assert node.read() == before
    assert served.lost == []
    link.close(farewell=True)
    for one in (hole, *queued):
        one.close()


def test_stalled_folder_accuses_nobody(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the folder blocks in every node, for longer than the silence after which a node is dead."""
    served = serve(slots=3)
    nodes = [served.node(f"n{index}") for index in range(3)]
    start_all(nodes, served)
    stalled, looking = threading.Event(), threading.Event()

    def stall(*_: object) -> list[StoreRecord]:
        looking.set()
        stalled.wait(DEADLINE)
        return []

    for name in ("stores", "newest_claim", "read_end", "read_all", "write_end"):
        monkeypatch.setattr(node_record, name, stall)
    began = time.monotonic()
    threads = [threading.Thread(target=node._best) for node in nodes]
    for thread in threads:
        thread.start()
    assert looking.wait(DEADLINE)
    while time.monotonic() < began + PEER_TIMEOUT + 1:
        assert all(node.read().restart == 0 for node in nodes)
        time.sleep(0.05)
    assert served.lost == []
    for thread in threads:
        thread.join(DEADLINE)
    stalled.set()


def test_stale_listing_creates_few_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim exists and the listing does not show it, as a network file system may do for a minute."""
    node_record.claim_store(tmp_path, 0)
    tries: list[int] = []
    monkeypatch.setattr(node_record, "newest_claim", lambda folder: -1)
    monkeypatch.setattr("keepwarm.launch.node.membership.SEARCH_TIMEOUT_S", 4.0)
    claim = node_record.claim_store

    def counted(folder: Path, number: int) -> bool:
        tries.append(number)
        return claim(folder, number)

    monkeypatch.setattr(node_record, "claim_store", counted)
    peers = PeerListener(run_secret(tmp_path), "127.0.0.1", "n0#1")
    membership = Membership(
        tmp_path, Member(node="n0#1", host="127.0.0.1", port=peers.port), Table(slots=1, max_restarts=0),
        peer_timeout=PEER_TIMEOUT, peers=peers, open_store=lambda number: pytest.fail("opened"),
    )  # fmt: skip
    with pytest.raises(Exception, match="n0 found no store to follow in 4 s"):
        membership.enter()
    assert 1 <= len(tries) <= 10
    peers.close()


@pytest.mark.parametrize("elects", [True, False], ids=["owners elect", "of an earlier start"])
def test_node_that_has_just_started_leaves_the_next_store_to_owners_that_elect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elects: bool
) -> None:
    monkeypatch.setattr("keepwarm.launch.node.membership.SEARCH_TIMEOUT_S", 4.0)
    secret, opened = run_secret(tmp_path), list[int]()
    node_record.claim_store(tmp_path, 0)
    owner = PeerListener(secret, "127.0.0.1", "n0#1")
    member = Member(node="n0#1", host="127.0.0.1", port=owner.port)
    if elects:
        owner.learn(Table(slots=1, max_restarts=0, view=View(number=(0, 1), members={0: member})))
    record = node_record.NodeRecord(node="n0", host="127.0.0.1", port=owner.port, slot=0, supervisor=1)
    node_record.write(tmp_path, record)
    with socket.socket() as refusing:  # bound, and no process listens
        refusing.bind(("127.0.0.1", 0))
        port = refusing.getsockname()[1]
        lost = StoreRecord(number=0, pid=1, host="127.0.0.1", port=port, heartbeat_port=port)
        node_record.write_store(tmp_path, lost)
        peers = PeerListener(secret, "127.0.0.1", "n1#1")
        me = Member(node="n1#1", host="127.0.0.1", port=peers.port)

        def open_store(number: int) -> None:
            opened.append(number)
            raise RuntimeError("opened")

        membership = Membership(
            tmp_path, me, Table(slots=1, max_restarts=0), peer_timeout=PEER_TIMEOUT, peers=peers, open_store=open_store
        )
        with pytest.raises(Exception, match="n1 found no store to follow in 4 s" if elects else "opened"):
            membership.enter()
    assert opened == ([] if elects else [1])
    owner.close()
    peers.close()


class Client:
    """A node that counts what the store sends it."""

    def __init__(self, served: Served, name: str) -> None:
        self.me = Member(node=identity(name, "1"), host="127.0.0.1", port=1)
        self.connection = served.dial()
        self.tables, self.requests = 0, 0
        self.table = Table(slots=1, max_restarts=0)
        self.answers: dict[int, Answer] = {}
        self.connection.send(Hello(node=self.me.node, heartbeat=False))

    def poll(self) -> None:
        while (body := self.connection.receive(0)) is not None:
            message = msgspec.json.decode(body, type=Update | Answer)
            if isinstance(message, Update):
                self.tables += 1
                self.table = message.table
            else:
                self.answers[message.number] = message

    def ask(self, change: Any) -> None:
        self.requests += 1
        self.connection.send(Request(number=self.requests, change=change))


def test_store_load_is_linear_in_nodes_and_none_when_nothing_changes(serve: Callable[..., Served]) -> None:
    count = 64
    served = serve(slots=count)
    nodes = [Client(served, f"n{index}") for index in range(count)]

    def poll() -> list[Client]:
        for node in nodes:
            node.poll()
        return nodes

    def answered() -> bool:
        return all(node.requests in node.answers for node in poll())

    for slot, node in enumerate(nodes):
        node.ask(Join(member=node.me, requested_slot=slot, known=Known()))
    until(answered, "all to join")
    until(lambda: all(len(node.table.owners) == count for node in poll()), "all to know the owners")
    for node in nodes:
        node.ask(Arrive(restart=0, view=node.table.number))
    until(lambda: all(node.table.complete for node in poll()), "the first start")
    for restart in range(3):
        before = sum(node.tables for node in nodes), sum(node.requests for node in nodes)
        for node in nodes:  # all workers fail at once
            node.ask(Fail(restart=restart, kind="failed", cause="lost its peers"))
        until(lambda: all(node.table.restart == restart + 1 for node in poll()), "the next restart")  # noqa: B023
        for node in nodes:
            node.ask(Arrive(restart=restart + 1, view=node.table.number))
        until(lambda: all(node.table.complete for node in poll()), "the next start")
        assert answered()
        assert sum(node.requests for node in nodes) - before[1] == 2 * count
        assert sum(node.tables for node in nodes) - before[0] <= 8 * count
    until(lambda: served.server._sent == served.server._version, "all to have the last table")
    quiet = [node.tables for node in nodes]
    version = served.server._version
    end = time.monotonic() + 2
    while time.monotonic() < end:
        poll()
        time.sleep(0.05)
    assert sum(node.tables for node in nodes) - sum(quiet) <= count
    assert served.server._version == version
    for node in nodes:
        node.connection.close()


def test_end_of_a_run_reaches_every_node(serve: Callable[..., Served]) -> None:
    served = serve()
    nodes = [served.node("n0"), served.node("n1")]
    start_all(nodes, served)
    nodes[1].change(End(code=3, reason="training stopped itself"))
    until(lambda: nodes[0].read().ended, "the end")
    stand = stand_of(run_secret(served.folder), served.record)
    assert isinstance(stand, Stand) or stand == "refused"


def test_side_writes_survive_a_full_and_a_hanging_folder(capfd: pytest.CaptureFixture[str]) -> None:
    side, done, hang = SideWrites(), list[int](), threading.Event()

    def full() -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    for _ in range(3):
        side.put(full)
    side.put(lambda: done.append(1))
    until(lambda: done == [1], "the write after those that fail")
    assert capfd.readouterr().err.count("No space left on device") == 1
    side.put(lambda: (hang.wait(DEADLINE), None)[1])
    for number in range(1000):
        side.put(lambda number=number: done.append(number))  # type: ignore[misc]
    assert "the run folder does not answer" in capfd.readouterr().err
    hang.set()
    side.close()
    assert 1 < len(done) < 1000
    assert within(lambda: full(), 5.0) is None


def test_slot_table_is_free_of_names_that_are_not_nodes() -> None:
    """A table whose workers run knows every owner's address, so that all can be asked."""
    table = Table(slots=1, max_restarts=0)
    me = Member(node="a#1", host="127.0.0.1", port=7)
    table = slot_table.join(slot_table.follow(table, me, Known()), me.node, 0)
    table = slot_table.arrive(table, me.node, 0)
    assert table.view is not None
    assert table.view.members == {0: me}
