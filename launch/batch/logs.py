"""`keepwarm logs RUN`: print the last lines of a run's logs, and follow them."""

import contextlib
import shlex
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from keepwarm.launch.batch.jobs import advice
from keepwarm.launch.batch.sweep_folder import runs_of, values_of
from keepwarm.launch.batch_system import batch_system
from keepwarm.launch.errors import OptionError
from keepwarm.launch.node.record import read_all
from keepwarm.launch.run.submission import read_submission
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.run_folder import RunFolder

_PAUSE = 0.5


def log_file(folder: Path, rank: int | None) -> Path:
    """Return the log of a rank, or of the newest job; without a job log, that of rank 0.

    Raises:
        OutputError: the log does not exist; names the existing logs.
        ClusterError: the run's batch system is not installed here.
    """
    found = _job_logs(folder) if rank is None else _rank_logs(folder, rank)
    if not found and rank is None:
        found = _rank_logs(folder, 0)
    if not found:
        logs = RunFolder(folder).logs
        there = ", ".join(sorted(path.name for path in logs.glob("*.log"))) or "none"
        wanted = "of a job" if rank is None else f"rank_{rank:05d}.log"
        raise OutputError(f"{logs}: no log {wanted}; there are: {there}{advice(folder, 'logs')}")
    return max(found, key=lambda path: path.stat().st_mtime)


def show_log(folder: Path, rank: int | None, lines: int, *, follow: bool) -> None:
    """Print the last lines of a log, or of that of each run of a sweep; with `follow`, continue until Ctrl-C.

    Raises:
        OptionError: `follow` for a sweep.
        Other errors as `log_file`.
    """
    if values_of(folder) is not None:
        if follow:
            raise OptionError(f"{folder}: --follow shows one run: name one of the folders of this sweep")
        for run in runs_of(folder):
            print(f"==> {shlex.quote(str(run))} <==")
            try:
                show_log(run, rank, lines, follow=False)
            except OutputError as error:
                print(error)
        return
    path = log_file(folder, rank)
    with path.open(encoding="utf-8", errors="replace") as file:
        print("".join(deque(file, maxlen=lines)), end="", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            for text in _added(file) if follow else ():
                print(text, end="", flush=True)


def _job_logs(folder: Path) -> list[Path]:
    recorded = read_submission(folder)
    return [] if recorded is None else batch_system(recorded.batch_system).logs(folder)


def _rank_logs(folder: Path, rank: int) -> list[Path]:
    own = RunFolder(folder).logs / f"rank_{rank:05d}.log"
    # Under a supervisor, rank 0 writes to the supervisor's output.
    node = [RunFolder(folder).logs / f"node_{record.node}.log" for record in read_all(folder) if record.slot == 0]
    return [path for path in (own, *(node if rank == 0 else ())) if path.is_file()]


def _added(file: Iterator[str]) -> Iterator[str]:
    while True:
        yield from file
        time.sleep(_PAUSE)
