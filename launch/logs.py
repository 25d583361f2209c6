"""`keepwarm logs RUN`: the ends of a run's logs, and what is added to them."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from launch.node_record import read_all
from trainer.errors import OutputError
from trainer.run_folder import RunFolder

_PAUSE = 0.5


def log_file(folder: Path, rank: int | None) -> Path:
    """The log of a rank, or of the newest job: that of its nodes, restarts and requeues.

    Raises:
        OutputError: there is none; names those that there are.
    """
    logs = RunFolder(folder).logs
    wanted = "slurm-*.log" if rank is None else f"rank_{rank:05d}.log"
    found = sorted(logs.glob(wanted), key=lambda path: path.stat().st_mtime)
    if not found and not rank:
        # Rank 0 writes to the output of its node's supervisor, where there are supervisors.
        first = [logs / f"node_{record.node}.log" for record in read_all(folder) if record.slot == 0]
        found = [path for path in (logs / "rank_00000.log", *first) if path.is_file()]
    if not found:
        there = ", ".join(sorted(path.name for path in logs.glob("*.log"))) or "none"
        raise OutputError(f"{logs}: no log {wanted}; there are: {there}")
    return found[-1]


def show_log(folder: Path, rank: int | None, lines: int, *, follow: bool) -> None:
    """Print the last lines of a log; with `follow` go on until Ctrl-C. Raises as `log_file`."""
    path = log_file(folder, rank)
    with path.open(encoding="utf-8", errors="replace") as file:
        print("".join(deque(file, maxlen=lines)), end="", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            for text in _added(file) if follow else ():
                print(text, end="", flush=True)


def _added(file: Iterator[str]) -> Iterator[str]:
    while True:
        yield from file
        time.sleep(_PAUSE)
