"""The signs of life that the watchers of a SLURM job wait for."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from keepwarm.launch.slurm.watcher import beat

DEADLINE = 30.0
MOST = 3


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
