"""Ends of a fork server at bad moments: with something unread on either side."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

import pytest

from keepwarm.launch.errors import LaunchError
from keepwarm.launch.forkserver import ForkServer, Worker

DEADLINE = 60.0


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """One that ends at once."""
    (tmp_path / "ends_at_once.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return Worker(module="ends_at_once", arguments=(), environment={})


def ended(pid: int) -> int:
    """Exit code of a child."""
    end = time.monotonic() + DEADLINE
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < end
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def test_fork_server_ends_without_a_word_when_its_client_goes_with_notices_unread(
    worker: Worker, capfd: pytest.CaptureFixture[str]
) -> None:
    server = ForkServer()
    server.start(worker)
    assert select.select([server._socket], [], [], DEADLINE)[0]  # the worker has ended, and that has not been read
    server._socket.close()
    assert ended(server.pid) == 0
    assert capfd.readouterr().err == ""


def test_worker_with_the_pid_of_an_earlier_one_counts_as_running(worker: Worker) -> None:
    with contextlib.closing(ForkServer()) as server:
        server.ended = dict.fromkeys(range(int(Path("/proc/sys/kernel/pid_max").read_text())), -9)
        pid = server.start(worker)
        assert pid not in server.ended
        end = time.monotonic() + DEADLINE
        while pid not in server.ended:
            assert time.monotonic() < end
            server.poll(0.1)
        assert server.ended[pid] == 0


def test_fork_server_killed_with_orders_unread_is_an_error_that_says_so(worker: Worker) -> None:
    server = ForkServer()
    pid = server.start(worker)
    while pid not in server.ended:
        server.poll(0.1)
    os.kill(server.pid, signal.SIGSTOP)
    server.send([-1], signal.SIGTERM)
    os.kill(server.pid, signal.SIGKILL)
    os.waitpid(server.pid, 0)
    with pytest.raises(LaunchError, match=f"the fork server of this node .process {server.pid}. has died"):
        server.poll(DEADLINE)
    with pytest.raises(LaunchError, match="has died"):
        server.start(worker)
    server._socket.close()
    server._socket.close()
