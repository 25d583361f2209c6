"""Networks of agents on one selector, over real loopback sockets, and frames written by hand."""

import contextlib
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from keepwarm.ft.protocol.messages import Hello, Known, Proof, SnapshotId
from keepwarm.ft.transport import auth
from keepwarm.ft.transport.link import Credentials, Link
from keepwarm.ft.transport.network import Network, NetworkLimits

SECRET = b"s" * 32
SNAPSHOT = SnapshotId("run", 0, 1, "layout")
LIMIT = 1 << 20


class Recorder:
    """A handler that keeps what it was told."""

    def __init__(self) -> None:
        self.network: Network
        self.seen: list[tuple[int, Any, bytes | None]] = []
        self.losses: list[str] = []
        self.refusals: list[str] = []

    def connected(self, link: Link) -> None:
        self.network.opened(link)

    def lost(self, link: Link, reason: str) -> None:
        self.network.forget(link)
        self.losses.append(reason)

    def refused(self, link: Link, reason: str) -> None:
        self.network.forget(link)
        self.refusals.append(reason)

    def target(self, link: Link, message: Any, size: int) -> memoryview | None:
        return memoryview(bytearray(size))

    def received(self, link: Link, message: Any, payload: memoryview | None) -> None:
        self.seen.append((link.slot, message, None if payload is None else bytes(payload)))

    def drained(self, link: Link) -> None:
        pass


class World:
    """Agents' networks on one selector."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.addresses: dict[int, tuple[str, int]] = {}
        self.all: list[Recorder] = []

    def add(
        self, slot: int, *, secret: bytes = SECRET, run: str = "run", incarnation: int = 0, **options: Any
    ) -> Recorder:
        handler = Recorder()
        hello = Hello(role="agent", run=run, slot=slot, epoch=0, incarnation=incarnation, nonce=auth.nonce())
        credentials = Credentials(hello=hello, secret=secret, roles=Network.ROLES)
        handler.network = Network(
            self.selector, handler, credentials, bind=("127.0.0.1", 0), resolve=self.addresses.get,
            limits=NetworkLimits(payload=LIMIT, **options),
        )  # fmt: skip
        self.addresses[slot] = handler.network.address
        self.all.append(handler)
        return handler

    def until(self, done: Callable[[], Any], deadline: float = 10.0) -> None:
        end = time.monotonic() + deadline
        while not done():
            assert time.monotonic() < end, "waited too long"
            for recorder in self.all:
                recorder.network.tick(time.monotonic())
            for key, mask in self.selector.select(0.01):
                key.data.ready(mask)

    def pair(self, **options: Any) -> tuple[Recorder, Recorder]:
        one, two = self.add(0, **options), self.add(1, **options)
        for handler in (one, two):
            handler.network.set_peers([0, 1])
        self.until(lambda: one.network.links and two.network.links)
        return one, two


@contextlib.contextmanager
def links() -> Iterator[World]:
    world = World()
    try:
        yield world
    finally:
        for handler in world.all:
            handler.network.close()
        world.selector.close()


def known(group: int) -> Known:
    return Known(snapshot=SNAPSHOT, prepared=(group,))


def write(sock: socket.socket, body: bytes) -> None:
    sock.sendall(struct.pack(">I", len(body)) + body)


def read(sock: socket.socket) -> Any:
    (length,) = struct.unpack(">I", exactly(sock, 4))
    return msgspec.msgpack.decode(exactly(sock, length), type=Hello | Proof)


def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        block = sock.recv(size - len(data))
        assert block
        data += block
    return data
