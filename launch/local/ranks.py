"""Run the ranks of a job as processes of this machine, as torchrun would: start, watch and end them together."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec

from keepwarm import signals
from keepwarm.exit_code import ExitCode
from keepwarm.files import READABLE, atomic_write
from keepwarm.launch.errors import RanksFailed
from keepwarm.launch.forkserver import PRELOADED, ForkServer, Worker
from keepwarm.launch.rank_processes import FAILURE_GRACE_S, RankProcesses
from keepwarm.side_writer import attempt

PIDS = "pids.json"
"""In the folder of logs: the pid of every rank."""
TERMINATION_GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""
TAIL_LINES = 20
"""Lines of a failed rank's log that an error shows."""
SIGNAL_POLL_INTERVAL_S = 0.2
"""Seconds between checks for signals to forward; the end of a rank is noticed at once."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """How many ranks to start, and how."""

    world_size: int
    threads_per_rank: int
    logs: Path
    max_restarts: int = 0
    """How often all ranks start again after one has crashed."""
    module: str = "keepwarm.trainer"
    preloaded: Sequence[str] = PRELOADED
    """Modules to import once, before ranks are forked."""
    reusable: bool = False
    """Whether ranks restart in the same process after others were killed."""


def run_ranks(arguments: Sequence[str], options: RankOptions) -> None:
    """Run `python -P -m MODULE ARGUMENTS` once per rank; return when all have ended with 0.

    Ranks are forked from one process that has imported `preloaded`, so a machine pays for the imports once.
    Rank 0 writes to this process's own stdout and stderr, the others to `logs/rank_NNNNN.log`. The ranks meet through
    a FileStore in the memory of this process, named by KEEPWARM_STORE. The first signal that asks this process to end
    is passed on to every rank as SIGTERM, so that they finish their step and save; the second one kills them. They die
    with this process, however it ends. When a rank crashes, all are ended and started again, up to `max_restarts`
    times; as under torchrun, TORCHELASTIC_RESTART_COUNT counts the restarts.

    Raises:
        RanksFailed: a rank failed; the others have ended too. Its exit code is the rank's own 2, 3, 4 or 6, 130 when a
            signal ended the run, and 4 for a crash.
        LaunchError: no rank could be started.
    """
    logs, limit = options.logs, options.max_restarts
    with attempt("logs"):
        logs.mkdir(parents=True, exist_ok=True)
    common = _environment(options.world_size, options.threads_per_rank)
    asked = _Asked()
    with (
        signals.handled(_FORWARDED, asked.count),
        contextlib.closing(ForkServer(options.preloaded, common)) as server,
        contextlib.ExitStack() as stores,
    ):
        processes = RankProcesses(server)
        for restart in range(limit + 1):
            with contextlib.ExitStack() as stack:
                ranks = _Start(processes, logs, asked, restarts_left=limit - restart)
                stack.callback(processes.kill)
                store = stores.enter_context(_file_in_memory())
                own = {"KEEPWARM_STORE": store, "TORCHELASTIC_RESTART_COUNT": str(restart)}
                processes.start(_workers(arguments, options, own))
                _write_pids(logs, processes.pids)
                ranks.watch()
                if not ranks.crashed:
                    ranks.raise_first_failure()
                    return
                _print_restart(processes, restart + 1, limit)


@contextlib.contextmanager
def _file_in_memory() -> Iterator[str]:
    """Yield the path of a new file that is gone with this process, however it ends."""
    descriptor = os.memfd_create("keepwarm-store")
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _workers(arguments: Sequence[str], options: RankOptions, environment: Mapping[str, str]) -> dict[int, Worker]:
    return {
        rank: Worker(
            module=options.module,
            arguments=tuple(arguments),
            environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=str(_log(options.logs, rank)) if rank else None,
            reusable=options.reusable,
        )
        for rank in range(options.world_size)
    }


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank:05d}.log"


def _write_pids(logs: Path, pids: Mapping[int, int]) -> None:
    """Tell drills which process is which rank: a forked process shows the environment of its parent."""
    with attempt(PIDS):
        atomic_write(logs / PIDS, msgspec.json.encode(pids), mode=READABLE)


def read_pids(logs: Path) -> dict[int, int]:
    """Return the pids of the newest start by rank; none if no rank was ever started."""
    try:
        return msgspec.json.decode((logs / PIDS).read_bytes(), type=dict[int, int])
    except (OSError, msgspec.DecodeError):
        return {}


def _print_restart(processes: RankProcesses, restart: int, limit: int) -> None:
    rank, code = processes.failures[0]
    how = (
        signal.Signals(-code).name
        if code < 0
        else f"exit code {code}" + (" as training hung" if code == ExitCode.HUNG else "")
    )
    print(f"keepwarm: rank {rank} ended with {how}; restarting all ranks ({restart} of {limit})", file=sys.stderr)


def _environment(world_size: int, threads: int) -> dict[str, str]:
    ours = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": str(threads),
    }
    only_this_machine = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {name: value for name, value in only_this_machine.items() if name not in os.environ} | ours


@dataclass
class _Asked:
    """Notes the signals that ask this process to end, from before the first start to the end of the last one."""

    urgency: int = 0
    """1: after saving, 2: at once."""

    def count(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal that asks this process to end."""
        repeated = self.urgency > 0
        self.urgency = 2 if repeated and number in (signal.SIGINT, signal.SIGTERM) else max(1, self.urgency)
        if number == signal.SIGINT and not repeated:
            text = "\ninterrupted: saving after this step, then ending; interrupt again to end at once\n"
            with attempt("stderr"):
                os.write(sys.stderr.fileno(), text.encode())


@dataclass
class _Start:
    """One start of all ranks: watches the processes and decides whether a failure is worth a restart."""

    processes: RankProcesses
    logs: Path
    asked: _Asked
    restarts_left: int

    def watch(self) -> None:
        """Return when every rank has ended. After a failure the others get two grace periods, then SIGKILL."""
        deadlines: Iterator[tuple[float, Callable[[], None]]] | None = None
        due: tuple[float, Callable[[], None]] | None = None
        forwarded = 0
        while not self.processes.poll(SIGNAL_POLL_INTERVAL_S):
            if self.asked.urgency > forwarded:
                forwarded = self.asked.urgency
                self.processes.send(signal.SIGTERM if forwarded == 1 else signal.SIGKILL)
            if self.processes.failures and deadlines is None:
                deadlines = self._deadlines()
                due = next(deadlines)
            elif due and time.monotonic() >= due[0]:
                due[1]()
                due = next(deadlines, None) if deadlines else None

    @property
    def crashed(self) -> bool:
        """Whether a rank crashed, no signal asked for the end, and restarts are left."""
        codes = [code for _, code in self.processes.failures]
        own = set(codes) & set(ExitCode.of_run())
        return self.restarts_left > 0 and not self.asked.urgency and bool(codes) and not own

    def _deadlines(self) -> Iterator[tuple[float, Callable[[], None]]]:
        start = time.monotonic()
        if self.crashed:
            # Their state is read back from memory or disk; there is nothing that they could still save.
            yield start, self._end_start
            return
        yield start + FAILURE_GRACE_S, lambda: self.processes.send(signal.SIGTERM)
        yield start + FAILURE_GRACE_S + TERMINATION_GRACE_S, self.processes.kill

    def _end_start(self) -> None:
        """Park the ranks that can be resumed, if the fault came from outside; kill the others."""
        if all(code < 0 for _, code in self.processes.failures):
            self.processes.park()
        self.processes.kill()

    def raise_first_failure(self) -> None:
        """Raise `RanksFailed` for the rank that failed first, with the end of its log unless rank 0 failed alike."""
        failures = self.processes.failures
        if not failures:
            return
        rank, code = failures[0]
        if ExitCode.STATE_NOT_SAVED in self.processes.codes.values():
            rank, code = next(failure for failure in failures if failure[1] == ExitCode.STATE_NOT_SAVED)
        elif self.asked.urgency or code == ExitCode.INTERRUPTED:
            raise RanksFailed("interrupted", ExitCode.INTERRUPTED)
        kept = code if code in ExitCode.of_run() else ExitCode.UNRECOVERABLE
        if kept != ExitCode.UNRECOVERABLE and (0, code) in failures:
            raise RanksFailed("", kept)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        message = f"rank {rank} of {len(self.processes.pids)} {how}"
        if rank:
            log = _log(self.logs, rank)
            message += f"; the end of {log}:\n{_tail(log)}"
        raise RanksFailed(message, kept)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"  (cannot be read: {error.strerror})"
    return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (empty)"
