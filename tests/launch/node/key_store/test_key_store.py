"""The store of the workers' keys behind a node's proxy, in a process of its own, and torch's own client."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psutil
import pytest
from torch.distributed import DistError, TCPStore

from keepwarm.launch.node.connections import Dialled
from keepwarm.launch.node.key_store import local_peer
from keepwarm.launch.node.key_store.proxy import NoLoopback, StoreProxy
from tests.support.runs.stand_ins import ROOT

pytestmark = pytest.mark.timeout(300)
DEADLINE = 60.0
LONG = timedelta(seconds=DEADLINE)
SHORT = timedelta(milliseconds=200)
SECRET, WRONG = b"s" * 64, b"w" * 64
MEMORY = 32 << 20
"""Bytes by which the process may grow while it is attacked."""
PING = b"\0" + struct.pack("<I", 0x3C85F7CE) + b"\x0d" + struct.pack("<I", 7)

PROGRAM = """
import resource, sys
from keepwarm.launch.node.key_store.proxy import StoreProxy
from keepwarm.launch.node.key_store.server import KeyServer
server, workers = KeyServer(bytes.fromhex(sys.argv[1]), "127.0.0.1"), []
proxy = StoreProxy(bytes.fromhex(sys.argv[2]), "n0", lambda: list(workers))
print(server.port, proxy.port, flush=True)
for line in sys.stdin:
    order, value = line.split()
    if order == "worker":
        workers.append(int(value))
    elif order == "limit":
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(value), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    else:
        proxy.open(("127.0.0.1", server.port), int(value))
    print("done", flush=True)
proxy.close()
server.close()
"""


STRANGER = """
import contextlib, socket, struct, sys
from keepwarm.ft.transport.descriptors import raise_limit
raise_limit()
frames = 10 * (struct.pack(">I", 1 << 31) + bytes(60))
kept = []
for port in map(int, sys.argv[1:]):
    kept += [socket.create_connection(("127.0.0.1", port), 60) for _ in range(1000)]
    for _ in range(1000):
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), 60) as rude:
            rude.sendall(frames)
print("done", flush=True)
sys.stdin.read()
"""


class Served:
    """A store and the proxy of one node."""

    def __init__(self, secret: bytes = SECRET) -> None:
        arguments = [sys.executable, "-P", "-c", PROGRAM, SECRET.hex(), secret.hex()]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        self.keys, self.port = map(int, self.process.stdout.readline().split())

    def order(self, order: str, value: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(order, value, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def client(self, timeout: timedelta = LONG) -> TCPStore:
        return TCPStore("127.0.0.1", self.port, is_master=False, timeout=timeout, wait_for_workers=False)

    def end(self) -> str:
        """End the process; return what it said."""
        _, said = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0
        return said


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(*, worker: bool = True, secret: bytes = SECRET) -> Served:
        made.append(Served(secret))
        if worker:
            made[-1].order("worker", os.getpid())
        made[-1].order("start", 0)
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.communicate()


def received(connection: socket.socket) -> bytes:
    """What arrives next; nothing from one that was closed, also with something unread."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(100)
    return b""


OPERATIONS: list[Callable[[Any], Any]] = [
    lambda one: one.get("absent"),
    lambda one: one.set("a", "1"),
    lambda one: one.get("a"),
    lambda one: one.add("a", 41),
    lambda one: one.add("new", -2),
    lambda one: one.append("a", "7"),
    lambda one: one.get("a"),
    lambda one: one.compare_set("a", "427", "x"),
    lambda one: one.compare_set("a", "427", "y"),
    lambda one: one.compare_set("missing", "z", "y"),
    lambda one: one.compare_set("made", "", "y"),
    lambda one: one.check(["a", "made"]),
    lambda one: one.check(["a", "missing"]),
    lambda one: one.wait(["a", "made"], LONG),
    lambda one: one.wait(["a", "missing"], SHORT),
    lambda one: one.multi_set(["m1", "m2"], ["1", ""]),
    lambda one: one.multi_get(["m1", "m2", "a"]),
    lambda one: one.multi_get(["m1", "missing"]),
    lambda one: one.delete_key("m1"),
    lambda one: one.delete_key("m1"),
    lambda one: one.num_keys(),
    lambda one: one.queue_push("q", "first"),
    lambda one: one.queue_push("q", "second"),
    lambda one: one.queue_len("q"),
    lambda one: one.queue_pop("q"),
    lambda one: one.queue_pop("q", False),
    lambda one: one.queue_pop("q", False),
    lambda one: one.queue_pop("q"),
    lambda one: one.clone().get("a"),
    lambda one: one.has_extended_api(),
    lambda one: one.set("k" * 8000, "v" * 100_000),
    lambda one: one.get("k" * 8000) == b"v" * 100_000,
]
NEWER = ("list_keys", "barrier")
"""Operations that not every torch from 2.11 on has."""


def outcome(operation: Callable[[Any], Any], one: Any) -> Any:
    try:
        return operation(one)
    except Exception as error:
        return type(error)


def test_torch_client_gets_the_answers_of_torchs_own_server(serve: Callable[..., Served]) -> None:
    operations = list(OPERATIONS)
    if all(hasattr(TCPStore, name) for name in NEWER):
        operations += [
            lambda one: sorted(one.list_keys()),
            lambda one: one.barrier("b", 1, LONG),
            lambda one: one.barrier("c", 2, SHORT),
            lambda one: sorted(one.list_keys()),
        ]
    of_torch = TCPStore("127.0.0.1", 0, is_master=True, timeout=LONG, wait_for_workers=False)
    ours = serve().client()
    for each in (of_torch, ours):
        each.set_timeout(SHORT)
    found = [[outcome(operation, one) for operation in operations] for one in (of_torch, ours)]
    assert found[1] == found[0]
    assert sum(isinstance(one, type) for one in found[0]) >= 4  # what waits in vain


def test_waiting_worker_is_woken_by_another_one(serve: Callable[..., Served]) -> None:
    served = serve()
    waiting, other = served.client(), served.client()
    woken: list[bytes] = []
    thread = threading.Thread(target=lambda: woken.append(waiting.get("a")))
    thread.start()
    other.set("b", "no")
    other.set("a", "yes")
    thread.join(DEADLINE)
    assert woken == [b"yes"]


def test_answers_longer_than_buffers_arrive_whole(serve: Callable[..., Served]) -> None:
    served = serve()
    one, names = served.client(), [f"k{number}" for number in range(4)]
    for number, name in enumerate(names):
        one.set(name, chr(97 + number) * (7 << 20))
    assert one.multi_get(names) == [bytes([97 + number]) * (7 << 20) for number in range(4)]
    assert served.end() == ""


def test_later_start_finds_no_key_of_an_earlier_one_whose_workers_are_cut_off(serve: Callable[..., Served]) -> None:
    served = serve()
    earlier = served.client()
    earlier.set("a", "1")
    assert earlier.num_keys() == 1
    served.order("start", 1)
    with pytest.raises(DistError):
        earlier.get("a")
    later = served.client()
    assert later.num_keys() == 0


def test_process_that_is_no_worker_is_not_let_in_though_of_the_same_user(serve: Callable[..., Served]) -> None:
    served = serve(worker=False)
    with pytest.raises(DistError):
        served.client(timedelta(seconds=1))
    with socket.create_connection(("127.0.0.1", served.port), DEADLINE) as stranger:
        stranger.sendall(PING)
        assert received(stranger) == b""
    assert "which no worker of this node opened" in served.end()


def test_worker_that_connects_before_it_is_known_is_let_in(serve: Callable[..., Served]) -> None:
    served = serve(worker=False)
    with socket.create_connection(("127.0.0.1", served.port), DEADLINE) as worker:
        worker.sendall(PING)
        served.order("worker", os.getpid())
        assert worker.recv(100) == struct.pack("<I", 7)


def test_worker_that_sends_garbage_is_cut_off_alone(serve: Callable[..., Served]) -> None:
    served = serve()
    one = served.client()
    with socket.create_connection(("127.0.0.1", served.port), DEADLINE) as worker:
        worker.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert received(worker) == b""
    one.set("a", "1")
    assert one.get("a") == b"1"
    assert "closed a worker's connection to the store, of n0: request 71" in served.end()


def test_wrong_secret_is_refused_with_a_sentence(serve: Callable[..., Served]) -> None:
    served = serve(secret=WRONG)
    with pytest.raises(ConnectionError, match="it belongs to run"):
        Dialled(WRONG, ("127.0.0.1", served.keys), connect_timeout=DEADLINE, timeout=DEADLINE)
    with pytest.raises(DistError):
        served.client(timedelta(seconds=1))
    said = served.end()
    assert f"n0: the store of the workers' keys at 127.0.0.1:{served.keys} cannot be reached: it belongs to run" in said
    assert "keepwarm: refused " in said


@pytest.mark.parametrize("way", local_peer.WAYS)
def test_every_way_tells_connections_of_a_port_apart(way: local_peer.Inodes) -> None:
    """Two callers may have one port at different addresses; torch's client calls from a socket of IPv6."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        here = listener.getsockname()
        one = stack.enter_context(socket.create_connection(here, DEADLINE))
        other = stack.enter_context(socket.socket())
        other.bind(("127.0.0.2", one.getsockname()[1]))
        other.connect(here)
        expected = {each.getsockname(): os.fstat(each.fileno()).st_ino for each in (one, other)}
        with contextlib.suppress(OSError):  # a machine without IPv6
            mapped = stack.enter_context(socket.socket(socket.AF_INET6))
            mapped.connect((f"::ffff:{here[0]}", here[1]))
            expected[here[0], mapped.getsockname()[1]] = os.fstat(mapped.fileno()).st_ino
        end = time.monotonic() + DEADLINE
        while (found := way(list(expected), here)) != expected:  # a table that changes while it is read may lack a line
            assert time.monotonic() < end, found
        assert local_peer.holds([os.getpid()], expected[one.getsockname()])
        assert not local_peer.holds([os.getppid()], expected[one.getsockname()])


def test_machine_that_does_not_tell_who_connects_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_peer, "WAYS", (lambda callers, listening: {},))
    with pytest.raises(NoLoopback, match=r"n0: workers cannot reach the store .*: Linux does not tell which process"):
        StoreProxy(SECRET, "n0", list)


def test_proxy_out_of_descriptors_goes_on_once_there_are_some(serve: Callable[..., Served]) -> None:
    served = serve()
    served.order("limit", psutil.Process(served.process.pid).num_fds())
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            waiting = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), DEADLINE))
            waiting.sendall(PING)
        assert received(waiting) in (b"", PING[-4:])  # shed, or let in where one was shed before it
    served.order("limit", 1024)
    one = served.client()
    one.set("a", "1")
    assert one.get("a") == b"1"


def test_strangers_at_both_ports_cost_nothing_while_workers_go_on(serve: Callable[..., Served]) -> None:
    served = serve()
    one, turns = served.client(), 0
    process = psutil.Process(served.process.pid)
    before = process.memory_info().rss
    arguments = [sys.executable, "-P", "-c", STRANGER, str(served.keys), str(served.port)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as stranger:
        assert stranger.stdout is not None
        said: list[str] = []
        attack = threading.Thread(target=lambda out: said.append(out.readline()), args=(stranger.stdout,))
        attack.start()
        while attack.is_alive():
            turns += 1
            assert one.add("turns", 1) == turns
        assert said == ["done\n"]
        assert served.client().get("turns") == str(turns).encode()  # another worker is let in
        assert process.num_fds() < 1000
        assert process.memory_info().rss - before < MEMORY
        stranger.communicate(timeout=DEADLINE)
    assert served.end().count("refused") < 20
