"""Real agents commit while a process without the secret does what the network allows."""

import contextlib
import os
import resource
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from keepwarm.ft.discovery.config import GroupConfig
from keepwarm.ft.discovery.registry import Endpoint
from keepwarm.ft.errors import AgentError
from keepwarm.ft.protocol.messages import Bucket, Part, SnapshotId, encode
from tests.support.ft.nodes import Nodes, nodes, random_state, together, wait_committed

SNAPSHOT = SnapshotId("run", 1, 1, "layout")
SOURCES = [f"127.0.1.{number}" for number in range(1, 33)]
MEMORY = 32 << 20
"""Bytes an agent may grow by while it is attacked."""
HEAD = struct.Struct(">I")


@pytest.fixture(autouse=True)
def many_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def address(world: Nodes, slot: int) -> tuple[str, int]:
    endpoint = msgspec.json.decode((world.folder / f"shared/agents/{slot}.json").read_bytes(), type=Endpoint)
    return endpoint.host, endpoint.port


def malformed() -> list[bytes]:
    """First frames that no agent sends."""
    bulk = [
        encode(Bucket(snapshot=SNAPSHOT, stripe=0, index=0, sum=0, size=0)),
        encode(Part(epoch=10**12, snapshot=SNAPSHOT, stripe=0, owner=1, index=0, count=1, sum=0, size=0)),
    ]
    return [HEAD.pack(len(body)) + body for body in [*bulk, b"\xc1abcd", os.urandom(100)]] + [
        HEAD.pack(2**32 - 1),
        HEAD.pack(513),
    ]


def reset(sock: socket.socket) -> None:
    """Close without leaving a port in TIME_WAIT."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def throw_frames(to: tuple[str, int], count: int) -> None:
    frames = malformed()
    for number in range(count):
        with contextlib.suppress(OSError):
            sock = socket.create_connection(to, 30, (SOURCES[number % len(SOURCES)], 0))
            with contextlib.suppress(OSError):
                sock.sendall(frames[number % len(frames)])
                sock.recv(1024)  # its hello, or the end
            reset(sock)


def scan(to: tuple[str, int], count: int) -> None:
    for _ in range(count):
        with contextlib.suppress(OSError):
            reset(socket.create_connection(to, 30))


@contextlib.contextmanager
def idle(to: tuple[str, int], count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for number in range(count):
            source = (SOURCES[number % len(SOURCES)], 0)
            stack.enter_context(contextlib.closing(socket.create_connection(to, 30, source)))
        yield


def commit_while(world: Nodes, snapshotters: Any, attack: Callable[[], None]) -> int:
    """Take snapshots for as long as the attack lasts. Return how many were committed."""
    running = threading.Thread(target=attack)
    running.start()
    step = 100
    while running.is_alive() or step < 103:
        step += 1
        for each in snapshotters:
            each.offer(step, b"meta")
        for each in snapshotters:
            each.join()
        for each in snapshotters:
            wait_committed(each)
    running.join()
    assert [world.status(slot).committed for slot in range(world.nodes)] == [(1, step)] * world.nodes
    return step - 100


@pytest.mark.parametrize(("waiting", "frames"), [(2_000, 3_000), pytest.param(5_000, 100_000, marks=pytest.mark.long)])
@pytest.mark.timeout(1200)
def test_agents_commit_and_keep_their_memory_while_strangers_attack(tmp_path: Path, waiting: int, frames: int) -> None:
    with nodes(tmp_path, 3, groups=[((0, 1, 2), 1)]) as world:
        snapshotters = world.snapshotters([random_state(rank, 3) for rank in range(3)])
        together(lambda each: each.restore(1), snapshotters)
        commit_while(world, snapshotters, lambda: None)
        before = {slot: psutil.Process(pid).memory_info().rss for slot, pid in world.pids.items()}
        victim = psutil.Process(world.pids[0])

        def attack() -> None:
            with idle(address(world, 0), waiting):
                began = sum(victim.cpu_times()[:2])
                throw_frames(address(world, 0), frames)
                print(f"agent: {(sum(victim.cpu_times()[:2]) - began) / frames * 1e6:.0f} CPU seconds per 10^6 frames")
                assert victim.num_fds() < 1000
                for slot in range(3):
                    scan(address(world, slot), 300)

        commit_while(world, snapshotters, attack)
        after = {slot: psutil.Process(pid).memory_info().rss for slot, pid in world.pids.items()}
        assert {slot: size for slot, size in after.items() if size > before[slot] + MEMORY} == {}
        assert world.log(0).count("refused a connection") < 30
        fresh = [random_state(rank, 3, seed=9) for rank in range(3)]
        for each in world.clients:
            each.close()
        restored = together(lambda each: each.restore(2), world.snapshotters(fresh))
        assert {each.step for each in restored} == {world.status(0).committed[1]}  # type: ignore[index]


def test_agent_with_few_descriptors_survives_idle_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def limited(command: list[str], **options: Any) -> Any:
        return popen(["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *command], **options)

    monkeypatch.setattr(subprocess, "Popen", limited)
    with nodes(tmp_path, 2) as world:
        assert resource.prlimit(world.pids[0], resource.RLIMIT_NOFILE) == (256, 256)
        with idle(address(world, 0), 1_000):
            snapshotters = world.snapshotters([random_state(rank, 2) for rank in range(2)])
            together(lambda each: each.restore(1), snapshotters)
            commit_while(world, snapshotters, lambda: None)


def test_agent_of_a_job_that_needs_more_descriptors_is_refused_at_start(tmp_path: Path) -> None:
    world = Nodes(tmp_path, 1)
    world.configs[0] = msgspec.structs.replace(
        world.configs[0],
        groups=tuple(GroupConfig(members=tuple(range(at, at + 30)), parity=2) for at in range(0, 30_000, 30)),
    )
    with pytest.raises(AgentError, match=r"30000 nodes needs .* this process may have \d+: raise the hard limit"):
        world.start(0)
