"""What those take who do not know the secret: no buffer, few descriptors, and nothing from others."""

import contextlib
import resource
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from keepwarm.ft.errors import TooFewDescriptors
from keepwarm.ft.protocol.messages import Bucket, Part, encode
from keepwarm.ft.transport import descriptors
from keepwarm.ft.transport.listener import network_of
from tests.support.ft.links import SNAPSHOT, World, known, links


@pytest.fixture
def world() -> Iterator[World]:
    with links() as made:
        yield made


@contextlib.contextmanager
def connections(address: tuple[str, int]) -> Iterator[Any]:
    """Opens a connection from a source address of its own choice; all are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda source: stack.enter_context(socket.create_connection(address, 10, (source, 0)))


def closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def test_strangers_from_one_address_close_their_own_oldest(world: World) -> None:
    one, two = world.pair(strangers=8)
    with connections(one.network.address) as connect:
        patient = [connect("127.0.0.3") for _ in range(2)]
        flood = [connect("127.0.0.2") for _ in range(20)]
        world.until(lambda: len(one.refusals) == 14)
        assert not any(closed(each) for each in patient)
        assert [closed(each) for each in flood] == [True] * 14 + [False] * 6
        one.network.links[1].send(known(1))
        world.until(lambda: two.seen)


def test_agent_gets_in_while_strangers_fill_every_place(world: World) -> None:
    one, two = world.add(0, strangers=4), world.add(1)
    with connections(one.network.address) as connect:
        for _ in range(10):
            connect("127.0.0.2")
        world.until(lambda: len(one.refusals) == 6)
        two.network.set_peers([0], needed=[0])
        world.until(lambda: 1 in one.network.links)


@pytest.mark.parametrize(
    "message",
    [
        Bucket(snapshot=SNAPSHOT, stripe=0, index=0, sum=0, size=0),
        Part(epoch=9, snapshot=SNAPSHOT, stripe=0, owner=1, index=0, count=1, sum=0, size=0),
    ],
)
def test_stranger_with_bulk_frame_gets_no_buffer(world: World, message: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = world.pair()
    asked: list[Any] = []
    monkeypatch.setattr(one, "target", lambda link, message, size: asked.append(message))
    body = encode(message)
    with connections(one.network.address) as connect:
        connect("127.0.0.1").sendall(struct.pack(">I", len(body)) + body)
        world.until(lambda: one.refusals)
    assert asked == []


@pytest.mark.parametrize("room", [0, 1, 3])
def test_accept_without_descriptors_sheds_load_and_listens_again(world: World, room: int) -> None:
    one, two = world.pair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connections(one.network.address) as connect:
        waiting = [connect("127.0.0.1") for _ in range(20)]
        probe = socket.socket()
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno() + room, hard))
        probe.close()
        try:
            world.until(lambda: sum(map(closed, waiting)) >= 20 - room)
            one.network.links[1].send(known(1))
            world.until(lambda: two.seen)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        late = world.add(2)
        late.network.set_peers([0], needed=[0])
        world.until(lambda: 2 in one.network.links)


def test_connection_that_is_reset_before_it_is_accepted_changes_nothing(world: World) -> None:
    one, two = world.pair()
    for _ in range(50):
        sock = socket.create_connection(one.network.address, 10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    one.network.links[1].send(known(1))
    world.until(lambda: two.seen)


def test_link_that_nobody_wants_is_closed_once_it_is_idle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.ft.transport.network.Network.LINGER", 0.2)
    one, two = world.pair()
    for handler in (one, two):
        handler.network.set_peers([])
    assert one.network.links  # in use a moment ago
    world.until(lambda: not one.network.links and not two.network.links)


def test_link_that_one_side_wants_is_dialled_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.ft.transport.network.Network.LINGER", 0.2)
    one, two = world.pair()
    one.network.set_peers([])
    two.network.set_peers([0], needed=[0])
    world.until(lambda: len(two.losses) >= 2 and bool(two.network.links))


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:0:1:2::3", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("process 7", "process 7"),
    ],
)
def test_address_ipv6_network_counts_as_one(address: str, counted: str) -> None:
    assert network_of(address) == counted


def test_descriptors_too_few_for_the_job_are_an_error_with_the_arithmetic() -> None:
    assert descriptors.needed(1) == 192
    assert descriptors.needed(1024) == 192 + 1023
    assert descriptors.strangers(1024, 1 << 20) == 512
    assert descriptors.strangers(2, 256) == 256 - 193
    with pytest.raises(TooFewDescriptors, match=r"1024 nodes needs 1231 .* may have 1024: raise the hard limit"):
        descriptors.strangers(1024, 1024)


def test_descriptors_limit_is_raised_to_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        assert descriptors.raise_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
