"""`keepwarm runs`: list the runs of a folder with their progress and the state of their jobs."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from keepwarm.launch.batch.jobs import jobs_of
from keepwarm.launch.batch_system import BatchJob
from keepwarm.launch.run.progress import Progress, progress
from keepwarm.trainer.errors import OutputError, TrainerError
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder

_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run as `keepwarm runs` lists it."""

    folder: str
    name: str
    progress: Progress | None
    """None if the run cannot be read."""
    job: BatchJob | None = None
    """First active job known to the batch system, else the last known one."""
    error: str | None = None
    """Why the run cannot be read."""

    @property
    def state(self) -> str:
        if self.job is not None:
            return self.job.state
        if self.progress is None:
            return "unreadable"
        return "finished" if self.progress.step >= self.progress.last_step else "ended" if self.progress.step else "new"


def runs_in(root: Path) -> list[RunRow]:
    """Return the runs at a folder and in its immediate subfolders, sorted by name.

    Raises:
        OutputError: there is no run.
        ClusterError: a run was submitted, but its batch system cannot be queried.
    """
    folders = [path.parent for path in (root / RUN_FILE, *sorted(root.glob(f"*/{RUN_FILE}"))) if path.is_file()]
    if not folders:
        raise OutputError(f"{root}: there is no run here or right below (no {RUN_FILE})")
    return [_row(folder) for folder in folders]


def show_runs(root: Path, *, as_json: bool) -> None:
    """Print the runs of a folder. Raises as `runs_in`."""
    rows = runs_in(root)
    if as_json:
        print(json.dumps([asdict(row) | {"state": row.state} for row in rows]))
    else:
        print("\n".join(table(rows)))


def table(rows: list[RunRow]) -> Iterator[str]:
    """Yield a header and one line per run, then the reason for each run that cannot be read."""
    lines = [("RUN", "STATE", "JOB", "NODES", "RESTARTS", "STEP", "LOSS", "TOKENS/S", "LEFT"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    yield from (f"{row.folder}: cannot be read: {row.error}" for row in rows if row.error is not None)


def _row(folder: Path) -> RunRow:
    try:
        known = jobs_of(folder)
        job = next((job for job in known if job.active), known[-1] if known else None)
        name = load_run(RunFolder(folder).run_file).name
        return RunRow(folder=str(folder), name=name, progress=progress(folder), job=job)
    except TrainerError as error:
        return RunRow(folder=str(folder), name=folder.name, progress=None, error=str(error))


def _cells(row: RunRow) -> tuple[str, ...]:
    done, job = row.progress, row.job
    if done is None:
        return (row.folder, row.state, *["-"] * 7)
    return (
        row.folder,
        row.state,
        job.id if job else "-",
        (job.nodes if job else "") or "-",
        str(job.restarts) if job else "-",
        f"{done.step}/{done.last_step}",
        "-" if done.loss is None else f"{done.loss:.4f}",
        "-" if done.tokens_per_s is None else f"{done.tokens_per_s:.0f}",
        "-" if done.eta_s is None else _time_left(done.eta_s),
    )


def _time_left(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < _DAY else f"{seconds / _DAY:.1f} days"
