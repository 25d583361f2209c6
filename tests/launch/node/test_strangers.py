"""A run on nodes goes on while a process without the secret does to store and supervisors what the network allows."""

import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from keepwarm.ft.protocol.messages import encode
from keepwarm.launch.node import record as node_record
from keepwarm.launch.node.connections import Address, Body, Dialled, run_secret
from keepwarm.launch.node.heartbeat import Heartbeat
from keepwarm.launch.node.peers import Announcement
from keepwarm.launch.node.record import StoreRecord
from keepwarm.launch.node.shared_table import End, GiveUp, Hello, Request
from keepwarm.trainer.monitor import events
from tests.launch.node.test_supervision import Cluster, cluster, names
from tests.support.runs.stand_ins import DEADLINE, alive

__all__ = ["cluster"]
pytestmark = pytest.mark.timeout(300)
IDLE = 500
MEMORY = 32 << 20
"""Bytes by which a process may grow while it is attacked."""
WRONG = b"0" * 64
HEAD = struct.Struct(">I")


def framed(message: object) -> bytes:
    body = message if isinstance(message, bytes) else msgspec.json.encode(message)
    return HEAD.pack(len(body)) + body


def forgeries(node: str, store: StoreRecord) -> list[bytes]:
    """What would end the run, or hide a death, if it were believed."""
    requests = [
        Hello(node=node, heartbeat=True),
        Hello(node=node, heartbeat=False),
        Request(number=1, change=End(code=0, reason="the job is done")),
        Request(number=2, change=GiveUp(why="asked to leave")),
        Announcement(store=store),
    ]
    plain = [b"".join(map(framed, requests))]
    wrapped = [framed(encode(Body(data=msgspec.json.encode(request)))) for request in requests]
    lengths = [HEAD.pack(2**32 - 1), HEAD.pack(513), bytes(64)]
    return [*plain, *wrapped, framed(b"not json"), framed(b"\xff" * 100), *lengths]


def throw(address: Address, data: bytes) -> None:
    """Send bytes, and wait until the connection is closed."""
    with contextlib.suppress(ConnectionError), socket.create_connection(address, DEADLINE) as stranger:
        stranger.sendall(data)
        while stranger.recv(1 << 16):
            pass


@contextlib.contextmanager
def idle(addresses: list[Address]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for address in addresses:
            for _ in range(IDLE):
                stack.enter_context(contextlib.closing(socket.create_connection(address, DEADLINE)))
        yield


class Relay:
    """Stands between a caller and a server, and keeps what the caller sends."""

    def __init__(self, to: Address) -> None:
        self.recorded = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._listener.getsockname()
        self._to = to
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        caller, _ = self._listener.accept()
        with self._listener, caller, socket.create_connection(self._to) as server:
            back = threading.Thread(target=self._pass, args=(server, caller), daemon=True)
            back.start()
            self._pass(caller, server, self.recorded)
            back.join()

    def _pass(self, source: socket.socket, to: socket.socket, record: bytearray | None = None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if record is not None:
                    record += data
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)


def replay(folder: Path, address: Address, messages: list[object]) -> None:
    """Send once more, on another connection, every byte with which an honest node said something."""
    relay = Relay(address)
    honest = Dialled(run_secret(folder), relay.address, connect_timeout=DEADLINE, timeout=DEADLINE)
    for message in messages:
        honest.send(message)
    assert honest.receive(DEADLINE) is not None
    honest.close()
    for size in (len(relay.recorded), len(relay.recorded) - 1):
        throw(address, bytes(relay.recorded[:size]))


def test_strangers_neither_end_a_run_nor_hide_a_death(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=1)
    owners = run.running(0)
    store = node_record.newest_store(run.folder)
    assert store is not None
    of_store = store.host, store.heartbeat_port
    addresses = [of_store, *((one.host, one.port) for one in owners.values())]
    pids = [store.pid, *(one.supervisor for one in owners.values())]
    before = {pid: psutil.Process(pid).memory_info().rss for pid in pids}
    lost = "n1#guessed"
    with idle(addresses):
        for address in addresses:
            for data in forgeries(lost, msgspec.structs.replace(store, number=9)):
                throw(address, data)
            with pytest.raises(ConnectionError):
                Dialled(WRONG, address, connect_timeout=DEADLINE, timeout=DEADLINE)
        with pytest.raises(ConnectionError):
            Heartbeat(WRONG, store, lost, DEADLINE, DEADLINE)
        replay(run.folder, of_store, [Hello(node="watcher#1", heartbeat=False)])
        assert all(psutil.Process(pid).num_fds() < 1000 for pid in pids)
        assert [pid for pid in pids if not alive(pid)] == []
        os.kill(owners[1].supervisor, signal.SIGKILL)
        assert names(run.running(1)) == ["n0", "n3", "n2"]
    kept = {pid: psutil.Process(pid).memory_info().rss - before[pid] for pid in pids if alive(pid)}
    assert {pid: grown for pid, grown in kept.items() if grown > MEMORY} == {}
    failures = [(event.kind, event.slots) for event in events.read(run.folder).of(events.Failure)]
    assert failures == [("lost", (1,))]
    assert len(node_record.stores(run.folder)) == 1
    assert run.log.read_text().count("refused") + store_log(run.folder).count("refused") < 40
    run.end(0)


def store_log(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "nodes").glob("store-*.log"))
