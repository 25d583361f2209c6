"""Ranks as processes of this machine: started, watched, ended together, as torchrun would."""

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec

from keepwarm.exit_code import ExitCode
from keepwarm.files import READABLE, atomic_write
from keepwarm.launch.errors import RanksFailed
from keepwarm.launch.forkserver import FAILURE_GRACE_S, KILL_TIMEOUT_S, PRELOADED, Nursery, Worker

PIDS = "pids.json"
"""In the folder of logs: the pid of every rank."""
TERMINATION_GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""
TAIL_LINES = 20
"""Lines of a failed rank's log that are shown."""
SIGNAL_POLL_INTERVAL_S = 0.2
"""Seconds between looks at what signals have asked for; ranks that end are seen at once."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """How many ranks are started, and how."""

    world_size: int
    threads_per_rank: int
    logs: Path
    max_restarts: int = 0
    """Times that all ranks start again after one crashed."""
    module: str = "keepwarm.trainer"
    preloaded: Sequence[str] = PRELOADED
    """Modules that are imported once, before the ranks are forked."""
    stay: bool = False
    """Whether ranks begin again in their process when others were killed."""


def run_ranks(arguments: Sequence[str], options: RankOptions) -> None:
    """Run `python -P -m MODULE ARGUMENTS` once per rank and return when all have ended with 0.

    Ranks are forked from one process that has imported `preloaded`, so that a machine pays for the imports once.
    Rank 0 writes to this process's own stdout and stderr, the others to `logs/rank_NNNNN.log`. The ranks meet through
    a FileStore in a private temporary folder, named by KEEPWARM_STORE. The first signal that asks this process to end
    is passed on to every rank as SIGTERM, so that they finish their step and save; the second kills them. They die
    with this process, however it ends. When a rank crashes, all are ended and started again, up to `max_restarts`
    times; as under torchrun, TORCHELASTIC_RESTART_COUNT tells them so.

    Raises:
        RanksFailed: a rank failed; the others have ended too. Its exit code is the rank's own 2, 3 or 4, 130 when a
            signal ended the run, and 4 for a crash.
        LaunchError: no rank could be started.
    """
    logs, limit = options.logs, options.max_restarts
    logs.mkdir(parents=True, exist_ok=True)
    common = _environment(options.world_size, options.threads_per_rank)
    with (
        contextlib.closing(Nursery(options.preloaded, common)) as nursery,
        tempfile.TemporaryDirectory(prefix="keepwarm-") as meeting_place,
    ):
        resting: dict[int, int] = {}
        for restart in range(limit + 1):
            with contextlib.ExitStack() as stack:
                left = limit - restart
                ranks = _Ranks(nursery, logs=logs, restarts_left=left, stay=options.stay, resting=resting)
                stack.enter_context(ranks.signals_counted())
                stack.callback(ranks.kill)
                own = {"KEEPWARM_STORE": f"{meeting_place}/store-{restart}", "TORCHELASTIC_RESTART_COUNT": str(restart)}
                for rank in range(options.world_size):
                    ranks.start(rank, options.module, arguments, own)
                _write_pids(logs, ranks.pids)
                ranks.watch()
                if not ranks.crashed:
                    ranks.judge()
                    return
                _say_restart(ranks, restart + 1, limit)
                resting = ranks.resting


def _write_pids(logs: Path, pids: Mapping[int, int]) -> None:
    """For those who look for a rank: a forked process shows the environment of its parent."""
    atomic_write(logs / PIDS, msgspec.json.encode(pids), mode=READABLE)


def read_pids(logs: Path) -> dict[int, int]:
    """Pids by rank of the ranks that were started last; none where nobody started any."""
    try:
        return msgspec.json.decode((logs / PIDS).read_bytes(), type=dict[int, int])
    except (OSError, msgspec.DecodeError):
        return {}


def _say_restart(ranks: "_Ranks", restart: int, limit: int) -> None:
    rank, code = ranks.failures[0]
    how = (
        signal.Signals(-code).name
        if code < 0
        else f"exit code {code}" + (" as training hung" if code == ExitCode.HUNG else "")
    )
    print(f"keepwarm: rank {rank} ended with {how}; starting all ranks again ({restart} of {limit})", file=sys.stderr)


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
class _Ranks:
    """The processes, and in which order they ended."""

    nursery: Nursery
    logs: Path
    pids: dict[int, int] = field(default_factory=dict)
    """By rank."""
    codes: dict[int, int] = field(default_factory=dict)
    """Exit codes by rank of those that have ended, first to last; negative for a signal."""
    signals: int = 0
    """How urgently this process was asked to end: 1 to save before, 2 at once."""
    restarts_left: int = 0
    stay: bool = False
    resting: dict[int, int] = field(default_factory=dict)
    """Processes that can begin again, by rank."""

    def start(self, rank: int, module: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        worker = Worker(
            module=module,
            arguments=tuple(arguments),
            environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=str(self.log(rank)) if rank else None,
            stays=self.stay,
        )
        self.pids[rank] = self.nursery.start(worker, self.resting.pop(rank, None))

    def log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.log"

    def watch(self) -> None:
        """Until every rank has ended. After a failure the others get two graces, then SIGKILL."""
        deadlines: Iterator[tuple[float, Callable[[], None]]] | None = None
        due: tuple[float, Callable[[], None]] | None = None
        forwarded = 0
        while not self.look(SIGNAL_POLL_INTERVAL_S):
            if self.signals > forwarded:
                forwarded = self.signals
                self.send(signal.SIGTERM if forwarded == 1 else signal.SIGKILL)
            if self.failures and deadlines is None:
                deadlines = self._deadlines()
                due = next(deadlines)
            elif due and time.monotonic() >= due[0]:
                due[1]()
                due = next(deadlines, None) if deadlines else None

    def look(self, seconds: float) -> bool:
        """Whether all ranks have ended; waits at most so long for one that does."""
        self.nursery.poll(seconds)
        ended = {rank: self.nursery.ended[pid] for rank, pid in self.pids.items() if pid in self.nursery.ended}
        # Of those that ended together, who was killed has not done so because of the others.
        news = sorted(ended.keys() - self.codes.keys(), key=lambda rank: (ended[rank] >= 0, rank))
        self.codes |= {rank: ended[rank] for rank in news}
        return len(self.codes) == len(self.pids)

    @property
    def failures(self) -> list[tuple[int, int]]:
        """(rank, exit code) of those that did not end with 0, first to last."""
        return [(rank, code) for rank, code in self.codes.items() if code]

    @property
    def crashed(self) -> bool:
        """A rank crashed, nobody asked for the end, and the ranks may be started again."""
        codes = [code for _, code in self.failures]
        return self.restarts_left > 0 and not self.signals and bool(codes) and not set(codes) & set(ExitCode.of_run())

    def _deadlines(self) -> Iterator[tuple[float, Callable[[], None]]]:
        start = time.monotonic()
        if self.crashed:
            # Their state is read back from memory or disk; there is nothing that they could still save.
            yield start, self.rest
            return
        yield start + FAILURE_GRACE_S, lambda: self.send(signal.SIGTERM)
        yield start + FAILURE_GRACE_S + TERMINATION_GRACE_S, self.kill

    def send(self, number: signal.Signals) -> None:
        """To every rank that still runs."""
        self.nursery.send(list(self.pids.values()), number)

    def rest(self) -> None:
        """Have those come to rest that can begin again, if the fault was from outside; end the others."""
        if all(code < 0 for _, code in self.failures):
            resting = self.nursery.halt([pid for rank, pid in self.pids.items() if rank not in self.codes])
            self.resting = {rank: pid for rank, pid in self.pids.items() if pid in resting}
            self.pids = {rank: pid for rank, pid in self.pids.items() if pid not in resting}
        self.kill()

    def kill(self) -> None:
        """End what still runs, and wait for it."""
        self.send(signal.SIGKILL)
        end = time.monotonic() + KILL_TIMEOUT_S
        while not self.look(SIGNAL_POLL_INTERVAL_S) and time.monotonic() < end:
            pass

    @contextlib.contextmanager
    def signals_counted(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._count) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        again = self.signals > 0
        self.signals = 2 if again and number in (signal.SIGINT, signal.SIGTERM) else max(1, self.signals)
        if number == signal.SIGINT and not again:
            notice = "\ninterrupted: ending after this step with the state saved; once more ends at once\n"
            os.write(sys.stderr.fileno(), notice.encode())

    def judge(self) -> None:
        """Raise for the rank that failed first, with the end of its log unless rank 0 said the same."""
        if not self.failures:
            return
        if self.signals:
            raise RanksFailed("interrupted", ExitCode.INTERRUPTED)
        rank, code = self.failures[0]
        kept = code if code in ExitCode.of_run() else ExitCode.UNRECOVERABLE
        if code == ExitCode.INTERRUPTED:
            raise RanksFailed("interrupted", ExitCode.INTERRUPTED)
        if kept != ExitCode.UNRECOVERABLE and (0, code) in self.failures:
            raise RanksFailed("", kept)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        message = f"rank {rank} of {len(self.pids)} {how}"
        if rank:
            message += f"; the end of {self.log(rank)}:\n{_tail(self.log(rank))}"
        raise RanksFailed(message, kept)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"  (cannot be read: {error.strerror})"
    return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (empty)"
