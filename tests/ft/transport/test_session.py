"""A relay between two agents that changes what follows an honest handshake loses the link, and nothing else happens."""

import functools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from keepwarm.ft.errors import AuthenticationFailed
from keepwarm.ft.protocol.messages import Bucket, Hello, encode
from keepwarm.ft.transport import auth
from keepwarm.ft.transport.link import Link
from keepwarm.ft.transport.session import TAG_BYTES, Direction
from tests.support.ft.links import LIMIT, SECRET, SNAPSHOT, World, exactly, known, links


@pytest.fixture
def world() -> Iterator[World]:
    with links() as made:
        yield made


class Relay:
    """Passes on both `Hello` and both `Proof`, then hands the sockets to a test."""

    def __init__(self, world: World, to: tuple[str, int]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        world.addresses[1] = self._listener.getsockname()[:2]
        self._to = to
        self.ready = threading.Event()
        self._thread = threading.Thread(target=self._pass_handshake, daemon=True)
        self._thread.start()

    def _pass_handshake(self) -> None:
        self.near, _ = self._listener.accept()
        self.far = socket.create_connection(self._to, timeout=30)
        for one, other in ((self.near, self.far), (self.far, self.near)) * 2:
            other.sendall(frame(one))
        self.ready.set()

    def close(self) -> None:
        self._thread.join(10)
        for sock in (self._listener, self.near, self.far):
            sock.close()


def frame(sock: socket.socket, tail: int = 0) -> bytes:
    """One frame as it is on the wire, with `tail` bytes after it."""
    head = exactly(sock, 4)
    return head + exactly(sock, struct.unpack(">I", head)[0] + tail)


def relayed(world: World, **options: Any) -> tuple[Any, Any, Relay]:
    """Agents 0 and 1, whose link passes through a relay."""
    one, two = world.add(0, **options), world.add(1, **options)
    relay = Relay(world, two.network.address)
    one.network.set_peers([1])
    world.until(lambda: 1 in one.network.links and 0 in two.network.links)
    assert relay.ready.wait(10)
    return one, two, relay


def injected(relay: Relay) -> None:
    body = encode(known(7))
    relay.far.sendall(struct.pack(">I", len(body)) + body + bytes(TAG_BYTES))


def replayed(relay: Relay) -> None:
    first = frame(relay.near, TAG_BYTES)
    relay.far.sendall(first + first)


def reordered(relay: Relay) -> None:
    first, second = frame(relay.near, TAG_BYTES), frame(relay.near, TAG_BYTES)
    relay.far.sendall(second + first)


def left_out(relay: Relay) -> None:
    frame(relay.near, TAG_BYTES)
    relay.far.sendall(frame(relay.near, TAG_BYTES))


def truncated(relay: Relay) -> None:
    whole = frame(relay.near, TAG_BYTES)
    relay.far.sendall(whole[:-1])
    relay.far.shutdown(socket.SHUT_WR)


def reflected(relay: Relay) -> None:
    relay.near.sendall(frame(relay.near, TAG_BYTES))


@pytest.mark.parametrize("attack", [injected, replayed, reordered, left_out, truncated, reflected])
def test_relay_that_changes_frames_loses_the_link_and_nothing_else(
    world: World, attack: Callable[[Relay], None]
) -> None:
    one, two, relay = relayed(world)
    try:
        one.network.links[1].send(known(1))
        one.network.links[1].send(known(2))
        world.until(lambda: not one.network.links[1].channel.pending)
        attack(relay)
        victim = one if attack is reflected else two
        world.until(lambda: victim.losses)
        assert victim.losses[0] in (
            "a frame is not the next one that the other side sent",
            "closed by the other side in the middle of a frame",
        )
        assert [message for _, message, _ in victim.seen] == ([known(1)] if attack is replayed else [])
    finally:
        relay.close()


@pytest.mark.parametrize("everything", [False, True])
def test_relay_that_changes_payload_is_found_where_payloads_have_a_mac(world: World, everything: bool) -> None:
    one, two, relay = relayed(world, authenticate_payloads=everything)
    try:
        message = Bucket(snapshot=SNAPSHOT, stripe=0, index=0, sum=0, size=1000)
        one.network.links[1].send(message, memoryview(bytes(1000)))
        world.until(lambda: not one.network.links[1].channel.pending)
        head, payload = frame(relay.near, TAG_BYTES), exactly(relay.near, 1000 + (TAG_BYTES if everything else 0))
        relay.far.sendall(head + b"\x01" + payload[1:])
        world.until(lambda: two.losses or two.seen)
        if everything:
            assert two.losses == ["a payload is not the one that the other side sent"]
            assert two.seen == []
        else:  # the xxh3 in the frame is for the receiver of the bucket to compare
            assert two.seen[0][2] == b"\x01" + bytes(999)
    finally:
        relay.close()


def wanted(link: Link, message: Bucket, size: int) -> memoryview | None:
    return None if message.index == 1 else memoryview(bytearray(size))


def test_payloads_with_mac_arrive_whole_or_dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = world.pair(authenticate_payloads=True)
    data = np.random.default_rng(0).integers(0, 256, LIMIT, np.uint8)
    released: list[int] = []
    monkeypatch.setattr(two, "target", wanted)
    for index, size in enumerate((LIMIT, LIMIT, 0, 1, 70_000)):
        message = Bucket(snapshot=SNAPSHOT, stripe=0, index=index, sum=0, size=size)
        one.network.links[1].send(message, data[:size].data, functools.partial(released.append, index))
        one.network.links[1].send(known(index))
    world.until(lambda: len(two.seen) == 10)
    payloads = [payload for _, _, payload in two.seen[::2]]
    assert payloads == [bytes(data), None, b"", bytes(data[:1]), bytes(data[:70_000])]
    assert released == [0, 1, 2, 3, 4]


def test_session_keys_differ_by_direction_nonce_and_secret() -> None:
    mine = Hello(role="agent", run="run", slot=0, epoch=0, incarnation=0, nonce=b"n" * 32)
    theirs = Hello(role="agent", run="run", slot=1, epoch=0, incarnation=0, nonce=b"m" * 32)
    later = Hello(role="agent", run="run", slot=1, epoch=0, incarnation=0, nonce=b"o" * 32)
    keys = auth.session_keys(SECRET, mine, theirs, dialled=True)
    other = auth.session_keys(SECRET, theirs, mine, dialled=False)
    assert (keys.sending, keys.receiving) == (other.receiving, other.sending)
    different = {
        keys.sending,
        keys.receiving,
        auth.session_keys(SECRET, mine, later, dialled=True).sending,
        auth.session_keys(b"t" * 32, mine, theirs, dialled=True).sending,
        auth.proof(SECRET, mine, theirs, dialled=True).mac,
    }
    assert len(different) == 5


def test_direction_same_frame_twice_has_two_macs() -> None:
    sending, receiving = Direction(b"k" * 32, payloads=False), Direction(b"k" * 32, payloads=False)
    first, second = sending.tag(b"frame"), sending.tag(b"frame")
    assert first != second
    receiving.check(b"frame", first)
    with pytest.raises(AuthenticationFailed):
        receiving.check(b"frame", first)
