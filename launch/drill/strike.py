"""Doing to a run what a fault says. From outside: signals, bytes in the agents' memory, the checkpoint folder."""

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
"""Seconds that an agent has to answer, and a drill to find it with its newest snapshot committed."""
LOOKS = 10
BROKEN_BYTES = 64

Undo = Callable[[], None]


def strike(fault: Fault, folder: Path, token: str) -> tuple[float, Undo | None]:
    """Do it now; returns when it happened, in seconds since 1970, and how to end what does not end by itself.

    Raises:
        DrillError: what it is aimed at does not exist at the moment.
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
        "supervisor": processes.supervisor,
    }
    if fault.target == "store":
        victims = processes.store()
    else:
        victims = [found for number in fault.numbers for found in aims[fault.target](number)]
    if fault.target == "node":
        # A node that dies does not see parts of itself die: nothing of it may act any more.
        _send(victims, signal.SIGSTOP)
    return _send(victims, signal.SIGKILL), None


def _send(found: list[Found], number: signal.Signals) -> float:
    """Returns when the first of them got it."""
    began = time.time()
    for process in found:
        process.send(number)
    return began


def _wake(frozen: list[Found]) -> None:
    _send(frozen, signal.SIGCONT)


def corrupt(processes: Processes, slot: int) -> float:
    """Break bytes of the newest committed snapshot in a node's memory and kill a worker of that node; returns when.

    The workers stand still meanwhile. A newer snapshot that others could complete without the victim must not be under
    way then, or that one would be restored: they go on for a moment until none is.
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
                _break(_memory(agent.pid, f"data{held.data}"))
                return _send(victim, signal.SIGKILL)
        select.select([], [], [], 0.05)


def _ranks_of(processes: Processes, slot: int) -> list[int]:
    if processes.records:
        return processes.ranks(slot)
    each = load_run(RunFolder(processes.folder).run_file).layout.ranks_per_node
    return list(range(slot * each, (slot + 1) * each))


def _newest_committed(folder: Path, agent: Found, *, alone: bool) -> Held | None:
    """What the agent holds; None while a newer one may be committed though one of the node's workers dies.

    It may not be while that worker has not written its part: nothing newer is sealed, or, if there are other workers
    (not `alone`), even begun.
    """
    before: Held | None = None
    for _ in range(LOOKS):
        held = [snapshot for snapshot in _status(folder, agent).held if snapshot.data is not None]
        newest = max((snapshot for snapshot in held if snapshot.phase == "committed"), key=_age, default=None)
        harmless = ("filling", "draining") if alone else ("draining",)
        if newest is None or any(_age(each) > _age(newest) and each.phase not in harmless for each in held):
            before = None
        elif newest == before:
            # At the second look the agent has read what its workers had sent before they stood still.
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
    """The agent's memory of a slot, as a file."""
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
    """Put a file where the checkpoint folder is: every access fails, for root as well. Returns how to undo that."""
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
    """An agent may make the folder anew in the moment in which it is away: it is empty then, and goes again."""
    for _ in range(100):
        yield
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                path.rmdir()
            folder.rmdir()
