"""Ranks as processes of this machine: started, watched, ended together, as torchrun would."""

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch.errors import RanksFailed

FAILURE_GRACE = 10.0
"""Seconds the other ranks have to end by themselves after one failed: they may be about to say the same."""
TERMINATION_GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
TAIL_LINES = 20
"""Lines of a failed rank's log that are shown."""

INTERRUPTED = 130
_KEPT_CODES = (2, 3, 4, INTERRUPTED)
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_ranks(
    arguments: Sequence[str], *, world_size: int, threads_per_rank: int, logs: Path, max_restarts: int = 0
) -> None:
    """Run `python -P -m trainer ARGUMENTS` once per rank and return when all have ended with 0.

    Rank 0 writes to this process's own stdout and stderr, the others to `logs/rank_NNNNN.log`. The ranks meet through
    a FileStore in a private temporary folder, named by KEEPWARM_STORE. The first signal that asks this process to end
    is passed on to every rank as SIGTERM, so that they finish their step and save; the second kills them. They die
    with this process, however it ends. When a rank crashes, all are ended and started again, up to `max_restarts`
    times; as under torchrun, TORCHELASTIC_RESTART_COUNT tells them so.

    Raises:
        RanksFailed: a rank failed; the others have ended too. Its exit code is the rank's own 2, 3 or 4, 130 when a
            signal ended the run, and 4 for a crash.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="keepwarm-") as meeting_place:
        for restart in range(max_restarts + 1):
            with contextlib.ExitStack() as stack:
                ranks = _Ranks(logs=logs, restarts_left=max_restarts - restart)
                stack.enter_context(ranks.signals_forwarded())
                stack.callback(ranks.kill)
                store = Path(meeting_place) / f"store-{restart}"
                for rank in range(world_size):
                    ranks.start(rank, arguments, _environment(rank, world_size, threads_per_rank, store, restart))
                ranks.watch()
                if not ranks.crashed:
                    ranks.judge()
                    return
                _say_restart(ranks, restart + 1, max_restarts)


def _say_restart(ranks: "_Ranks", restart: int, limit: int) -> None:
    rank, code = ranks.failures[0]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    print(f"keepwarm: rank {rank} ended with {how}; starting all ranks again ({restart} of {limit})", file=sys.stderr)


def _environment(rank: int, world_size: int, threads: int, store: Path, restart: int) -> dict[str, str]:
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "KEEPWARM_STORE": str(store),
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }
    only_this_machine = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return only_this_machine | dict(os.environ) | ours


@dataclass
class _Ranks:
    """The processes, and in which order they ended."""

    logs: Path
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    failures: list[tuple[int, int]] = field(default_factory=list)
    """(rank, return code) of those that did not end with 0, first to last."""
    signalled: bool = False
    restarts_left: int = 0

    def start(self, rank: int, arguments: Sequence[str], environment: dict[str, str]) -> None:
        with contextlib.ExitStack() as stack:
            log = None if rank == 0 else stack.enter_context(self.log(rank).open("ab"))
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )

    def log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.log"

    def watch(self) -> None:
        """Until every rank has ended. After a failure the others get two graces, then SIGKILL."""
        deadlines: Iterator[tuple[float, Callable[[], None]]] | None = None
        due: tuple[float, Callable[[], None]] | None = None
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            for rank, process in self.processes.items():
                handle = os.pidfd_open(process.pid)
                stack.callback(os.close, handle)
                selector.register(handle, selectors.EVENT_READ, rank)
            while selector.get_map():
                timeout = max(0.0, due[0] - time.monotonic()) if due else None
                ended = selector.select(timeout)
                for key, _ in ended:
                    selector.unregister(key.fileobj)
                self._note({key.data for key, _ in ended})
                if self.failures and deadlines is None:
                    deadlines = self._deadlines()
                    due = next(deadlines)
                elif due and time.monotonic() >= due[0]:
                    due[1]()
                    due = next(deadlines, None) if deadlines else None

    def _note(self, ended: set[int]) -> None:
        codes = [(rank, self.processes[rank].wait()) for rank in sorted(ended)]
        failed = [(rank, code) for rank, code in codes if code]
        self.failures += sorted(failed, key=lambda failure: failure[1] >= 0)

    @property
    def crashed(self) -> bool:
        """A rank crashed, nobody asked for the end, and the ranks may be started again."""
        codes = [code for _, code in self.failures]
        return self.restarts_left > 0 and not self.signalled and bool(codes) and not set(codes) & set(_KEPT_CODES)

    def _deadlines(self) -> Iterator[tuple[float, Callable[[], None]]]:
        start = time.monotonic()
        if self.crashed:
            # Their state is read back from memory or disk; there is nothing that they could still save.
            yield start, self.kill
            return
        yield start + FAILURE_GRACE, lambda: self.send(signal.SIGTERM)
        yield start + FAILURE_GRACE + TERMINATION_GRACE, self.kill

    def send(self, number: signal.Signals) -> None:
        """To every rank that still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End what still runs, and wait for it."""
        self.send(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()

    @contextlib.contextmanager
    def signals_forwarded(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.signalled and number in (signal.SIGINT, signal.SIGTERM):
            self.send(signal.SIGKILL)
            return
        self.signalled = True
        if number == signal.SIGINT:
            notice = "\ninterrupted: ending after this step with the state saved; once more ends at once\n"
            os.write(sys.stderr.fileno(), notice.encode())
        self.send(signal.SIGTERM)

    def judge(self) -> None:
        """Raise for the rank that failed first, with the end of its log unless rank 0 said the same."""
        if not self.failures:
            return
        if self.signalled:
            raise RanksFailed("interrupted", INTERRUPTED)
        rank, code = self.failures[0]
        kept = code if code in _KEPT_CODES else 4
        if code == INTERRUPTED:
            raise RanksFailed("interrupted", INTERRUPTED)
        if kept != 4 and (0, code) in self.failures:
            raise RanksFailed("", kept)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        message = f"rank {rank} of {len(self.processes)} {how}"
        if rank:
            message += f"; the end of {self.log(rank)}:\n{_tail(self.log(rank))}"
        raise RanksFailed(message, kept)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"  (cannot be read: {error.strerror})"
    return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (empty)"


def _die_with_parent() -> Callable[[], None]:
    """For a child between fork and exec: the kernel kills it when this process ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask_kernel
