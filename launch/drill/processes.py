"""Find the processes of a run by the token in their environment, which everything that a drill starts inherits."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from keepwarm.files import await_readable
from keepwarm.ft.keeper import AGENT_MODULE
from keepwarm.launch.errors import DrillError
from keepwarm.launch.local.ranks import read_pids
from keepwarm.launch.node import record as node_record
from keepwarm.launch.node.record import NodeRecord
from keepwarm.trainer.job.run_folder import RunFolder

TOKEN = "KEEPWARM_DRILL"
"""Environment variable inherited by every process of a drill."""


@dataclass(frozen=True, slots=True)
class Found:
    """A process of the run at the time of the scan."""

    pid: int
    started: float
    command: tuple[str, ...] = field(compare=False)
    environment: dict[str, str] = field(compare=False)

    def send(self, number: signal.Signals) -> bool:
        """Signal exactly this process; return False if it has exited, even if its pid has been reused."""
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            handle = os.pidfd_open(self.pid)
            try:
                if psutil.Process(self.pid).create_time() != self.started:
                    return False
                signal.pidfd_send_signal(handle, number)
                return True
            finally:
                os.close(handle)
        return False


def living(token: str) -> list[Found]:
    """Return every process that carries the token, except zombies."""
    return [found for process in psutil.process_iter() if (found := _look(process, token)) is not None]


def _look(process: psutil.Process, token: str) -> Found | None:
    with contextlib.suppress(psutil.Error, OSError):
        environment = process.environ()
        if environment.get(TOKEN) == token and process.status() != psutil.STATUS_ZOMBIE:
            return Found(process.pid, process.create_time(), tuple(process.cmdline()), environment)
    return None


def _module(found: Found) -> str:
    """Return the module that the process runs with `python -m`."""
    words = found.command
    return words[words.index("-m") + 1] if "-m" in words[:-1] else ""


@dataclass(frozen=True)
class Processes:
    """Processes of a run by role, at one point in time."""

    folder: Path
    all: dict[int, Found]
    """All processes by pid."""
    records: tuple[NodeRecord, ...]
    """Records of nodes that have a slot."""

    @classmethod
    def look(cls, folder: Path, token: str) -> "Processes":
        """Scan the machine's processes and the records in the run folder."""
        records = [record for record in node_record.read_all(folder) if record.slot is not None]
        return cls(folder, {found.pid: found for found in living(token)}, tuple(records))

    def worker(self, rank: int) -> list[Found]:
        """Return the worker of a rank.

        Raises:
            DrillError: it is not running.
        """
        recorded = [record.workers[rank] for record in self.records if rank in record.workers]
        if not self.records:
            recorded = [pid for each, pid in read_pids(RunFolder(self.folder).logs).items() if each == rank]
        found = [self.all[pid] for pid in recorded if pid in self.all]
        return self._or_raise(found[-1:], f"worker of rank {rank}")

    def workers(self) -> list[Found]:
        """Return all running workers."""
        pids = {pid for record in self.records for pid in record.workers.values()}
        if not self.records:
            pids = set(read_pids(RunFolder(self.folder).logs).values())
        return [self.all[pid] for pid in sorted(pids) if pid in self.all]

    def agent(self, slot: int) -> list[Found]:
        """Return the snapshot agent of a slot."""
        recorded = [record.agent for record in self.records if record.slot == slot and record.agent in self.all]
        if recorded:
            return [self.all[pid] for pid in recorded[-1:] if pid is not None]
        agents = [found for found in self.all.values() if _module(found) == AGENT_MODULE]
        found = [agent for agent in agents if _slot_of(agent) == slot]
        return self._or_raise(found, f"snapshot agent of node {slot}")

    def keeper(self, slot: int) -> list[Found]:
        """Return the keeper of a slot's memory, which is the parent of its agent."""
        parent = _parent(self.agent(slot)[0].pid)
        return self._or_raise([self.all[parent]] if parent in self.all else [], f"keeper of node {slot}")

    def ranks(self, slot: int) -> list[int]:
        """Return the ranks on the node that owns a slot.

        Raises:
            DrillError: none of them is running.
        """
        ranks = sorted(rank for rank, pid in self._owner(slot).workers.items() if pid in self.all)
        if not ranks:
            raise DrillError(f"no worker of node {slot} runs")
        return ranks

    def supervisor(self, slot: int) -> list[Found]:
        """Return the supervisor of the node that owns a slot."""
        return self._or_raise([self.all[self._owner(slot).supervisor]], f"supervisor of node {slot}")

    def node(self, slot: int) -> list[Found]:
        """Return all processes on the node that owns a slot, the supervisor first."""
        record = self._owner(slot)
        pids = [record.supervisor, *_descendants(record.supervisor), record.keeper, record.agent]
        pids += record.workers.values()
        pids += [pid for worker in record.workers.values() for pid in _descendants(worker)]
        return [self.all[pid] for pid in dict.fromkeys(pids) if pid is not None and pid in self.all]

    def store(self) -> list[Found]:
        """Return the process of the nodes' rendezvous store."""
        record = node_record.newest_store(self.folder)
        return self._or_raise([self.all[record.pid]] if record and record.pid in self.all else [], "store")

    def _owner(self, slot: int) -> NodeRecord:
        """Return the record of the live owner of a slot; a replaced node may still have a record of the slot."""
        owners = [record for record in self.records if record.slot == slot and record.supervisor in self.all]
        owners = [record for record in owners if record.state not in ("fenced", "ended")]
        if not owners:
            raise DrillError(f"no node owns slot {slot} right now")
        return max(owners, key=lambda record: record.restart)

    @staticmethod
    def _or_raise(found: list[Found], what: str) -> list[Found]:
        if not found:
            raise DrillError(f"the {what} does not run")
        return found


def _slot_of(agent: Found) -> int | None:
    """Return an agent's slot from its configuration folder, `<run>-<slot>` or `<run>-<slot>.<node>`."""
    slot = Path(agent.command[-1]).parent.name.rpartition("-")[2].partition(".")[0]
    return int(slot) if slot.isdigit() else None


def _parent(pid: int) -> int | None:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).ppid()
    return None


def _descendants(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


@contextlib.contextmanager
def paused(processes: Iterable[Found]) -> Iterator[None]:
    """Stop the processes inside the block."""
    stopped = [found for found in processes if found.send(signal.SIGSTOP)]
    try:
        yield
    finally:
        for found in stopped:
            found.send(signal.SIGCONT)


def wait_until_gone(token: str, deadline: float) -> list[Found]:
    """Wait until no process carries the token; return those left after `deadline` seconds."""
    end = time.monotonic() + deadline
    while (left := living(token)) and (seconds := end - time.monotonic()) > 0:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(left[0].pid)
            try:
                await_readable(handle, seconds)
            finally:
                os.close(handle)
    return left
