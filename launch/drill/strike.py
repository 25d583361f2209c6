"""Inject faults into a run from outside, by signals, the agents' memory and the checkpoint folder."""

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from keepwarm.ft.discovery.status import Held, Status
from keepwarm.ft.errors import FtError
from keepwarm.ft.transport.auth import SECRET, load_secret, run_identity
from keepwarm.ft.worker.client import AgentClient
from keepwarm.launch.drill.faults import Fault
from keepwarm.launch.drill.processes import Found, Processes, paused
from keepwarm.launch.errors import DrillError
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RunFolder

AGENT_TIMEOUT_S = 10.0
"""Timeout of an agent's answer, and of the wait for its newest snapshot to be committed."""
LOOKS = 10
BROKEN_BYTES = 64

Undo = Callable[[], None]


def strike(fault: Fault, folder: Path, token: str) -> tuple[float, Undo | None]:
    """Inject the fault now; return its Unix time and, for a fault that does not end by itself, the undo function.

    Raises:
        DrillError: the target does not exist at the moment.
    """
    processes = Processes.look(folder, token)
    if fault.target == "disk":
        return time.time(), stop_disk(RunFolder(folder).checkpoints)
    if fault.target == "chunk":
        return corrupt(processes, fault.numbers[0]), None
    if fault.action == "freeze":
        frozen = [found for slot in fault.numbers for found in processes.node(slot)]
        return _send(frozen, signal.SIGSTOP), lambda: _wake(frozen)
    aims = {
        "worker": processes.worker,
        "node": processes.node,
        "agent": processes.agent,
        "keeper": processes.keeper,
        "supervisor": processes.supervisor,
    }
    if fault.target == "store":
        victims = processes.store()
    else:
        victims = [found for number in fault.numbers for found in aims[fault.target](number)]
    if fault.target == "node":
        # A dying node does not see its own parts die: stop all of them first, so that none can react.
        _send(victims, signal.SIGSTOP)
    return _send(victims, signal.SIGKILL), None


def _send(found: list[Found], number: signal.Signals) -> float:
    """Signal the processes; return the Unix time of the first signal."""
    began = time.time()
    for process in found:
        process.send(number)
    return began


def _wake(frozen: list[Found]) -> None:
    _send(frozen, signal.SIGCONT)


def corrupt(processes: Processes, slot: int) -> float:
    """Corrupt the newest committed snapshot in a node's memory and kill a worker of that node; return the Unix time.

    The workers are stopped meanwhile. If a newer snapshot is in progress that the others could complete without the
    victim, it would be restored instead: in that case, let the workers continue for a moment and try again.
    """
    agent = processes.agent(slot)[0]
    ranks = _ranks_of(processes, slot)
    victim = processes.worker(ranks[-1])
    end = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        with paused(processes.workers()):
            held = _newest_committed(processes.folder, agent, alone=len(ranks) == 1)
            if held is None and time.monotonic() > end:
                raise DrillError(
                    f"the agent of process {agent.pid} had no moment in {AGENT_TIMEOUT_S:g} s in which its newest "
                    "snapshot was committed and could be corrupted"
                )
            if held is not None:
                try:
                    _break(_memory(agent.pid, f"data{held.data}"))
                except OSError as error:
                    raise DrillError(f"the memory of process {agent.pid} is gone: {error}") from error
                return _send(victim, signal.SIGKILL)
        select.select([], [], [], 0.05)


def _ranks_of(processes: Processes, slot: int) -> list[int]:
    if processes.records:
        return processes.ranks(slot)
    each = load_run(RunFolder(processes.folder).run_file).layout.ranks_per_node
    return list(range(slot * each, (slot + 1) * each))


def _newest_committed(folder: Path, agent: Found, *, alone: bool) -> Held | None:
    """Return the agent's newest committed snapshot; None while a newer one may still commit after a worker's death.

    No newer snapshot can commit while the worker has not written its part: none is sealed or, if the node has other
    workers (not `alone`), even begun.
    """
    before: Held | None = None
    for _ in range(LOOKS):
        held = [snapshot for snapshot in _status(folder, agent).held if snapshot.data is not None]
        newest = max((snapshot for snapshot in held if snapshot.phase == "committed"), key=_age, default=None)
        harmless = ("filling", "draining") if alone else ("draining",)
        if newest is None or any(_age(each) > _age(newest) and each.phase not in harmless for each in held):
            before = None
        elif newest == before:
            # By the second poll, the agent has read everything that its workers sent before they were stopped.
            return newest
        else:
            before = newest
        select.select([], [], [], 0.02)
    return None


def _age(held: Held) -> tuple[int, int]:
    return held.epoch, held.step


def _status(folder: Path, agent: Found) -> Status:
    socket = Path(agent.command[-1]).with_name("agent.sock")
    try:
        secret = load_secret(folder / SECRET)
        run = run_identity(secret)
        client = AgentClient(socket, run=run, secret=secret, role="onlooker", deadline=AGENT_TIMEOUT_S)
    except FtError as error:
        raise DrillError(f"the agent of process {agent.pid} cannot be asked: {error}") from error
    try:
        return client.status()
    except FtError as error:
        raise DrillError(f"the agent of process {agent.pid} does not answer: {error}") from error
    finally:
        client.close()


def _memory(pid: int, label: str) -> Path:
    """Return the path of an agent's memory file by its label."""
    name = re.compile(rf"/memfd:keepwarm:{label}(?: \(deleted\))?")
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if name.fullmatch(str(path.readlink())):
                return path
    raise DrillError(f"process {pid} has no memory keepwarm:{label}")


def _break(memory: Path) -> None:
    """Invert the first bytes, which always belong to a snapshot."""
    with memory.open("r+b", buffering=0) as file:
        before = os.pread(file.fileno(), BROKEN_BYTES, 0)
        os.pwrite(file.fileno(), bytes(byte ^ 0xFF for byte in before), 0)


def stop_disk(folder: Path) -> Undo:
    """Replace the checkpoint folder with a file, so that every access fails, even as root; return an undo function.

    If it is replaced already, the undo function of the first time is the one that counts.
    """
    if folder.is_file():
        return lambda: None
    aside = folder.with_name(f".{folder.name}.stopped")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    for _ in _attempts(folder):
        with contextlib.suppress(FileExistsError, IsADirectoryError):
            os.close(os.open(folder, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            break

    def undo() -> None:
        if not folder.is_file():
            return
        folder.unlink()
        if aside.exists():
            for _ in _attempts(folder):
                with contextlib.suppress(OSError):
                    aside.rename(folder)
                    break

    return undo


def _attempts(folder: Path) -> Iterator[None]:
    """Yield attempts to replace the folder. An agent may recreate it in between; it is empty then and is removed."""
    for _ in range(100):
        yield
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                path.rmdir()
            folder.rmdir()
