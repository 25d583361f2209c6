"""`keepwarm runs`: list the runs of a folder with their progress and the state of their jobs."""

import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from keepwarm.exit_code import ExitCode
from keepwarm.launch.batch.jobs import jobs_of
from keepwarm.launch.batch_system import BatchJob
from keepwarm.launch.run.progress import Progress, progress
from keepwarm.launch.run.submission import read_submission
from keepwarm.trainer.errors import OutputError, TrainerError
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.monitor import events

_DAY = 86_400
DEPTH = 3
"""How many folders below the given one runs are looked for."""
_ENDS = {"done": "completed", "give up": "failed", "cancel": "cancelled"}
FINISHED = ("completed", "finished")
"""States of a run that is complete."""
WELL = (*FINISHED, "cancelled", "ended", "new")
"""States of a run without an active job in which nothing has failed."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run as `keepwarm runs` lists it."""

    folder: str
    name: str
    progress: Progress | None
    """None if the run cannot be read."""
    job: BatchJob | None = None
    """First active job known to the batch system, else the last known one."""
    end: str | None = None
    """State of the last job by the run's own events, for when the batch system has forgotten it."""
    why: str | None = None
    """Why the job is pending, or has ended."""
    submitted: bool = False
    error: str | None = None
    """Why the run cannot be read."""

    @property
    def state(self) -> str:
        if self.job is not None:
            return self.job.state
        if self.progress is None:
            return "unreadable"
        if self.end is not None:
            return self.end
        if self.progress.step >= self.progress.last_step:
            return "finished"
        return "ended" if self.progress.step or self.submitted else "new"

    @property
    def failed(self) -> bool:
        """Return whether the run's last job has failed, or cannot be known."""
        if self.job is not None and (self.job.active or self.job.exit_code == ExitCode.INTERRUPTED):
            return False
        return self.state not in WELL


def runs_in(root: Path) -> list[RunRow]:
    """Return the runs at a folder and in its subfolders, `DEPTH` levels down, sorted by name.

    Raises:
        OutputError: there is no run.
        ClusterError: a run was submitted, but its batch system cannot be queried.
    """
    folders = list(_run_folders(root))
    if not folders:
        raise OutputError(f"{root}: there is no run here or up to {DEPTH} folders below (no {RUN_FILE})")
    return [_row(folder) for folder in folders]


def _run_folders(root: Path) -> Iterator[Path]:
    # Folders in runs hold no runs, but for a folder of runs that is itself one.
    depth = 1 if (root / RUN_FILE).is_file() else DEPTH
    for here, below, files in os.walk(root):
        folder = Path(here)
        if RUN_FILE in files:
            yield folder
        is_last = folder != root and (RUN_FILE in files or len(folder.relative_to(root).parts) >= depth)
        below[:] = [] if is_last else sorted(name for name in below if not name.startswith("."))


def last_end(log: Sequence[events.Event]) -> tuple[str | None, str | None]:
    """Return the state of the run's last batch job by its events, and why it ended so; None while it goes on. Pure."""
    state = why = None
    for event in log:
        if isinstance(event, events.BatchStarted):
            state = why = None
        elif isinstance(event, events.BatchEnded):
            state, why = _ENDS.get(event.verdict), event.why
        elif isinstance(event, events.RequeueRefused) and state is None:
            state, why = "ended", f"not requeued: {event.why}"
    return state, why


def show_runs(root: Path, *, as_json: bool) -> None:
    """Print the runs of a folder. Raises as `runs_in`."""
    rows = runs_in(root)
    if as_json:
        print(json.dumps([asdict(row) | {"state": row.state} for row in rows]))
    else:
        print("\n".join(table(rows)))


def table(rows: list[RunRow]) -> Iterator[str]:
    """Yield a header and one line per run, then the reason for each run that cannot be read, or waits, or has ended.

    Folders are quoted for a shell.
    """
    lines = [("RUN", "STATE", "JOB", "NODES", "RESTARTS", "STEP", "LOSS", "TOKENS/S", "LEFT"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    yield from (f"{shlex.quote(row.folder)}: cannot be read: {row.error}" for row in rows if row.error is not None)
    yield from (f"{shlex.quote(row.folder)}: {row.state}: {row.why}" for row in rows if row.why is not None)


def _row(folder: Path) -> RunRow:
    try:
        known = jobs_of(folder)
        job = next((job for job in known if job.active), known[-1] if known else None)
        name = load_run(RunFolder(folder).run_file).name
        end, why = last_end(events.read(folder).events)
        if job is not None and job.phase != "ended":
            why = job.reason or None
        elif end == "completed" or (job is not None and job.state == "completed"):
            why = None
        submitted = read_submission(folder) is not None
        return RunRow(
            folder=str(folder), name=name, progress=progress(folder), job=job, end=end, why=why, submitted=submitted
        )
    except TrainerError as error:
        return RunRow(folder=str(folder), name=folder.name, progress=None, error=str(error))


def _cells(row: RunRow) -> tuple[str, ...]:
    done, job, folder = row.progress, row.job, shlex.quote(row.folder)
    if done is None:
        return (folder, row.state, *["-"] * 7)
    return (
        folder,
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
