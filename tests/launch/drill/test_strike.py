"""Faults from outside: only processes of the run are touched, and a disk that was stopped comes back whole."""

import dataclasses
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from keepwarm.launch.drill.processes import TOKEN, Processes, living, paused, wait_until_gone
from keepwarm.launch.drill.strike import stop_disk
from keepwarm.launch.errors import DrillError
from keepwarm.launch.node import record as node_record
from keepwarm.launch.node.record import NodeRecord


@pytest.fixture
def token() -> str:
    return secrets.token_hex(8)


@pytest.fixture
def child(token: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the run that does nothing."""
    command = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]
    with subprocess.Popen(command, env={**os.environ, TOKEN: token}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_living_processes_are_those_with_the_token(child: "subprocess.Popen[bytes]", token: str) -> None:
    assert [found.pid for found in living(token)] == [child.pid]
    assert living(secrets.token_hex(8)) == []


def test_living_reused_pid_is_not_signalled(child: "subprocess.Popen[bytes]", token: str) -> None:
    (found,) = living(token)
    assert not dataclasses.replace(found, started=found.started - 1).send(signal.SIGKILL)
    assert psutil.Process(child.pid).is_running()
    assert found.send(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    assert not found.send(signal.SIGKILL)
    assert wait_until_gone(token, 30.0) == []


def test_wait_until_gone_leftover_process_is_reported(child: "subprocess.Popen[bytes]", token: str) -> None:
    assert [found.pid for found in wait_until_gone(token, 0.05)] == [child.pid]


def test_paused_processes_continue_afterwards(child: "subprocess.Popen[bytes]", token: str) -> None:
    with paused(living(token)):
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    _, status = os.waitpid(child.pid, os.WCONTINUED)
    assert os.WIFCONTINUED(status)


def test_owner_of_a_slot_is_the_living_one(child: "subprocess.Popen[bytes]", token: str, tmp_path: Path) -> None:
    gone = NodeRecord(node="a", host="h", slot=0, supervisor=2**22 + 1, workers={0: 2**22 + 2}, restart=3)
    here = NodeRecord(node="b", host="h", slot=0, supervisor=child.pid, workers={0: child.pid}, restart=2)
    for record in (gone, here, NodeRecord(node="c", host="h", slot=None, supervisor=1)):
        node_record.write(tmp_path, record)
    processes = Processes.look(tmp_path, token)
    assert [found.pid for found in processes.node(0)] == [child.pid]
    assert [found.pid for found in processes.worker(0)] == [child.pid]
    assert processes.ranks(0) == [0]
    with pytest.raises(DrillError, match="no node owns slot 1 right now"):
        processes.node(1)
    with pytest.raises(DrillError, match="the worker of rank 1 does not run"):
        processes.worker(1)
    with pytest.raises(DrillError, match="the snapshot agent of node 0 does not run"):
        processes.agent(0)
    with pytest.raises(DrillError, match="the store does not run"):
        processes.store()


def test_stop_disk_undo_restores_contents(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "iter_0000001").mkdir(parents=True)
    (folder / "latest").write_text("iter_0000001")
    undo = stop_disk(folder)
    with pytest.raises(NotADirectoryError):
        (folder / "tmp-1-2").mkdir(parents=True)
    with pytest.raises(NotADirectoryError):
        (folder / "latest").read_text()
    undo()
    assert (folder / "latest").read_text() == "iter_0000001"
    assert (folder / "iter_0000001").is_dir()
    undo()
    assert folder.is_dir()


def test_stop_disk_unused_folder_can_be_stopped(tmp_path: Path) -> None:
    undo = stop_disk(tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints").is_file()
    undo()
    assert list(tmp_path.iterdir()) == []


def test_stop_disk_that_is_stopped_waits_for_the_first_undo(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "iter_0000001").mkdir(parents=True)
    first, second = stop_disk(folder), stop_disk(folder)
    second()
    assert folder.is_file()
    first()
    assert (folder / "iter_0000001").is_dir()
