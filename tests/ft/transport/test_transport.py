"""Links between agents over real loopback sockets: who gets in, what is refused, and that the others keep working."""

import contextlib
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepwarm.ft.errors import AuthenticationFailed
from keepwarm.ft.protocol.messages import Bucket, Farewell, Hello, Proof, encode
from keepwarm.ft.transport import auth
from keepwarm.ft.transport.bandwidth import TokenBucket
from keepwarm.ft.transport.network import Network
from tests.support.ft.links import LIMIT, SECRET, SNAPSHOT, Recorder, World, known, links, read, write


@pytest.fixture
def world() -> Iterator[World]:
    with links() as made:
        yield made


def test_link_messages_and_payloads_arrive_in_order(world: World) -> None:
    one, two = world.pair()
    data = np.random.default_rng(0).integers(0, 256, LIMIT, np.uint8)
    released = []
    for index, size in enumerate((LIMIT, 0, 1, 70_000)):
        message = Bucket(snapshot=SNAPSHOT, stripe=0, index=index, sum=0, size=size)
        one.network.links[1].send(message, data[:size].data, lambda i=index: released.append(i))
        one.network.links[1].send(known(index))
    two.network.links[0].send(known(9))
    world.until(lambda: len(two.seen) == 8 and one.seen)
    assert [payload for _, _, payload in two.seen[::2]] == [bytes(data[:n]) for n in (LIMIT, 0, 1, 70_000)]
    assert [message.prepared for _, message, _ in two.seen[1::2]] == [(0,), (1,), (2,), (3,)]
    assert one.seen == [(1, known(9), None)]
    assert released == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("stranger", "why"),
    [
        ({"secret": b"t" * 32}, "does not know the job's secret"),
        ({"run": "other"}, "belongs to run 'other'"),
    ],
)
def test_link_stranger_is_refused_and_others_continue(world: World, stranger: dict[str, Any], why: str) -> None:
    one, two = world.pair()
    three = world.add(2, **stranger)
    one.network.set_peers([0, 1, 2])
    world.until(lambda: one.refusals)
    assert why in one.refusals[0]
    assert 2 not in one.network.links
    assert 0 not in three.network.links
    one.network.links[1].send(known(1))
    world.until(lambda: two.seen)


def test_link_unexpected_slot_is_refused(world: World) -> None:
    one = world.add(0)
    world.add(2)
    world.addresses[1] = world.addresses[2]
    one.network.set_peers([1])
    world.until(lambda: one.refusals)
    assert "slot 1 was expected, slot 2 answered" in one.refusals[0]


def test_link_later_incarnation_replaces_earlier_only(world: World) -> None:
    one = world.add(0)
    late = world.add(1, incarnation=5)
    one.network.set_peers([1])
    world.until(lambda: 1 in one.network.links)
    dial(one, incarnation=4)
    world.until(lambda: "a later incarnation of this slot is connected" in one.losses)
    assert one.network.links[1].theirs is not None
    assert one.network.links[1].theirs.incarnation == 5
    assert late.losses == []


def test_link_frozen_agent_is_dropped_once_slot_is_reassigned(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.ft.transport.link.HANDSHAKE_DEADLINE", 1e9)
    one = world.add(0)
    with socket.create_server(("127.0.0.1", 0)) as frozen:  # its kernel takes connections, nobody answers
        world.addresses[1] = frozen.getsockname()[:2]
        one.network.set_peers([1])
        world.until(lambda: select.select([frozen], [], [], 0)[0])
        two = world.add(1, incarnation=2)
        two.network.set_peers([0])
        world.until(lambda: one.network.links and two.network.links)


def dial(to: Recorder, **change: Any) -> None:
    """Connect by hand as slot 1 and pass the handshake from a thread."""

    def talk() -> None:
        with socket.create_connection(to.network.address, timeout=10) as sock:
            mine = Hello(role="agent", run="run", slot=1, epoch=0, nonce=auth.nonce(), **{"incarnation": 0} | change)
            write(sock, encode(mine))
            theirs = read(sock)
            write(sock, encode(auth.proof(SECRET, mine, theirs, dialled=True)))
            with contextlib.suppress(OSError):
                while sock.recv(4096):
                    pass

    threading.Thread(target=talk, daemon=True).start()


def refused(world: World, to: Recorder, talk: Callable[[socket.socket], None]) -> str:
    """What the agent says of a peer that talks like this."""
    before = len(to.refusals) + len(to.losses)
    sock = socket.create_connection(to.network.address, timeout=10)
    try:
        with contextlib.suppress(OSError):
            talk(sock)
        world.until(lambda: len(to.refusals) + len(to.losses) > before)
    finally:
        sock.close()
    return to.refusals[-1] if to.refusals else to.losses[-1]


def test_handshake_replayed_proof_is_refused(world: World) -> None:
    one, _ = world.pair()
    mine = Hello(role="agent", run="run", slot=7, epoch=0, incarnation=0, nonce=b"n" * 32)
    theirs = Hello(role="agent", run="run", slot=0, epoch=0, incarnation=0, nonce=b"m" * 32)
    recorded = auth.proof(SECRET, mine, theirs, dialled=True)

    def replay(sock: socket.socket) -> None:
        write(sock, encode(mine))
        write(sock, encode(recorded))

    assert "does not know the job's secret" in refused(world, one, replay)


def test_handshake_reflected_proof_is_refused() -> None:
    mine = Hello(role="agent", run="run", slot=0, epoch=0, incarnation=0, nonce=b"n" * 32)
    theirs = Hello(role="agent", run="run", slot=1, epoch=0, incarnation=0, nonce=b"m" * 32)
    shown = auth.proof(SECRET, mine, theirs, dialled=True)
    auth.check_proof(SECRET, theirs, mine, shown, dialled=False)
    with pytest.raises(AuthenticationFailed):
        auth.check_proof(SECRET, mine, theirs, shown, dialled=True)
    with pytest.raises(AuthenticationFailed, match="our own nonce"):
        auth.check_hello(
            mine, Hello(role="agent", run="run", slot=1, epoch=0, incarnation=0, nonce=b"n" * 32), Network.ROLES
        )


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (struct.pack(">I", 513), "frame of 513 bytes is over the limit of 512"),
        (b"\xff\xff\xff\xff", "over the limit of 512"),
        (struct.pack(">I", 3) + b"abc", "malformed"),
        (struct.pack(">I", 40) + b"too short", "in the middle of a frame"),
    ],
)
def test_handshake_bad_frames_are_refused(world: World, first: bytes, why: str) -> None:
    one, _ = world.pair()

    def talk(sock: socket.socket) -> None:
        sock.sendall(first)
        sock.shutdown(socket.SHUT_WR)

    assert why in refused(world, one, talk)


def test_handshake_unexpected_message_is_refused(world: World) -> None:
    one, _ = world.pair()
    assert "Invalid value 'Known'" in refused(world, one, lambda sock: write(sock, encode(known(1))))
    assert "malformed" not in refused(world, one, lambda sock: write(sock, encode(Proof(mac=b"0" * 32))))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_handshake_fuzzed_bytes_are_refused_and_agent_continues(world: World, junk: bytes, framed: bool) -> None:
    one, two = (world.all[0], world.all[1]) if world.all else world.pair()
    content = struct.pack(">I", len(junk)) + junk if framed else junk

    def talk(sock: socket.socket) -> None:
        sock.sendall(content)
        sock.shutdown(socket.SHUT_WR)

    assert refused(world, one, talk)
    assert list(one.network.links) == [1]
    two.network.links[0].send(known(3))
    world.until(lambda: one.seen)
    one.seen.clear()


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (struct.pack(">I", (4 << 20) + 1), "over the limit of"),
        (struct.pack(">I", 5) + b"\xc1abcd", "malformed"),
        (
            (lambda body: struct.pack(">I", len(body)) + body)(
                encode(Bucket(snapshot=SNAPSHOT, stripe=0, index=0, sum=0, size=LIMIT + 1))
            ),
            "over the limit of 1048576",
        ),
    ],
)
def test_link_bad_frame_from_peer_ends_that_link_alone(world: World, frame: bytes, why: str) -> None:
    one, two = world.pair()
    three = world.add(2)
    for handler in world.all:
        handler.network.set_peers([0, 1, 2])
    world.until(lambda: all(len(handler.network.links) == 2 for handler in world.all))
    channel = three.network.links[0].channel
    assert channel._sending is not None
    channel.socket.send(frame + channel._sending.tag(frame))
    world.until(lambda: one.losses)
    assert why in one.losses[0]
    two.network.links[0].send(known(1))
    world.until(lambda: one.seen)
    world.until(lambda: 2 in one.network.links)


def test_link_silence_is_a_loss_and_idle_is_not(world: World) -> None:
    one, two = world.pair(silence=0.3)
    end = time.monotonic() + 1.0
    world.until(lambda: time.monotonic() > end)
    assert not one.losses
    world.all.remove(two)
    world.selector.unregister(two.network.links[0].channel.socket)
    world.until(lambda: one.losses)
    assert "waited 0.3 s for a sign of life" in one.losses[0]
    world.selector.register(two.network.links[0].channel.socket, selectors.EVENT_READ, two.network.links[0])
    world.all.append(two)


def test_link_truncated_payload_is_dropped_and_memory_released(world: World) -> None:
    one, two = world.pair()
    released = []
    data = bytes(LIMIT)
    for index in range(20):
        message = Bucket(snapshot=SNAPSHOT, stripe=0, index=index, sum=0, size=LIMIT)
        one.network.links[1].send(message, memoryview(data), lambda i=index: released.append(i))
    one.network.links[1].close("told to")
    assert released == list(range(20))
    world.until(lambda: two.losses)
    assert len(two.seen) < 20


def test_link_farewell_arrives_like_other_messages(world: World) -> None:
    one, two = world.pair()
    one.network.links[1].send(Farewell(reason="end of the job"))
    world.until(lambda: two.seen)


def test_token_bucket_limits_bytes_over_time() -> None:
    now = [0.0]
    bucket = TokenBucket(100.0, burst=50, clock=lambda: now[0])
    assert bucket.available() == 50
    bucket.take(50)
    assert bucket.available() == 0
    assert bucket.wait(25) == 0.25
    now[0] = 0.25
    assert bucket.available() == 25
    now[0] = 10.0
    assert bucket.available() == 50


def test_link_capped_traffic_arrives(world: World) -> None:
    one, two = world.pair(rate=2e6)
    data = bytes(LIMIT)
    for index in range(5):
        message = Bucket(snapshot=SNAPSHOT, stripe=0, index=index, sum=0, size=LIMIT)
        one.network.links[1].send(message, memoryview(data))
    world.until(lambda: len(two.seen) == 5)
