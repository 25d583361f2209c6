"""A rank that outlives SIGKILL, as one does that waits in the kernel for a GPU, is not replaced on its machine."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.launch import rank_processes
from keepwarm.launch.forkserver import ForkServer, Worker
from keepwarm.launch.rank_processes import OutlivesKill, RankProcesses
from tests.support.runs.stand_ins import alive, wait_until_dead


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    (tmp_path / "waits.py").write_text("import signal\nsignal.pause()\n")
    monkeypatch.syspath_prepend(tmp_path)
    return Worker(module="waits", arguments=(), environment={})


@pytest.fixture
def server(waiting: Worker) -> Iterator[ForkServer]:
    with contextlib.closing(ForkServer()) as server:
        yield server


def test_kill_of_rank_that_does_not_die_raises_and_no_second_one_starts(
    server: ForkServer, waiting: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "KILL_TIMEOUT_S", 0.5)
    ranks = RankProcesses(server)
    ranks.start({0: waiting})
    pid = ranks.pids[0]
    os.kill(server.pid, signal.SIGSTOP)  # so that the kill reaches the process later
    for _ in range(2):
        with pytest.raises(OutlivesKill, match=f"process {pid} is still there 0.5 s after SIGKILL"):
            ranks.kill()
    with pytest.raises(OutlivesKill):
        ranks.start({0: waiting})
    assert ranks.pids == {0: pid}
    assert alive(pid)
    os.kill(server.pid, signal.SIGCONT)
    wait_until_dead({pid})
    server.poll(60.0)
    ranks.start({0: waiting})
    assert ranks.pids != {0: pid}
    ranks.kill()
