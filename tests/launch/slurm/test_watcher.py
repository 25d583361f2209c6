"""The signs of life that the watchers of a SLURM job wait for."""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.launch.slurm import watcher
from keepwarm.launch.slurm.watcher import beat, watched

DEADLINE = 30.0
MOST = 3
WATCHER = (sys.executable, "-P", "-m", "keepwarm.launch.slurm.watcher")


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A batch script that accepts three connections."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        thread = threading.Thread(target=beat, args=(listening, stop, MOST, 0.01))
        thread.start()
        try:
            yield listening
        finally:
            stop.set()
            thread.join(DEADLINE)
    assert not thread.is_alive()


def test_beat_of_more_connections_than_allowed_reaches_the_first_and_then_those_that_follow(
    server: socket.socket,
) -> None:
    with contextlib.ExitStack() as stack:
        links = [
            stack.enter_context(socket.create_connection(server.getsockname(), timeout=DEADLINE))
            for _ in range(MOST + 1)
        ]
        assert [link.recv(1) for link in links[:MOST]] == [b"."] * MOST
        links[MOST].setblocking(False)
        with pytest.raises(BlockingIOError):
            links[MOST].recv(1)
        links[0].close()
        links[MOST].settimeout(DEADLINE)
        assert links[MOST].recv(1) == b"."


def test_watcher_is_reached_by_a_random_name_that_changes_with_each_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(watcher.SOCKET, "")
    names = []
    for _ in range(2):
        with watched(["localhost", "localhost"], lambda address: [*WATCHER, str(tmp_path), address, "node"]):
            names.append(os.environ[watcher.SOCKET])
            end = time.monotonic() + DEADLINE
            while not is_reached(names[-1]):
                assert time.monotonic() < end, "the watcher did not start"
    assert len(set(names)) == 2
    assert all(re.fullmatch("keepwarm-[0-9a-f]{32}", name) for name in names)


def is_reached(name: str) -> bool:
    with socket.socket(socket.AF_UNIX) as link:
        return link.connect_ex(f"\0{name}") == 0
