"""Runs in their folders: how far each is, what SLURM says of its job; ended, put back, listed, watched."""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import slurm
from launch.errors import ClusterError
from launch.submit import jobs_of
from trainer.errors import OutputError
from trainer.run_folder import RUN_FILE, RunFolder
from trainer.spec_file import load_run
from trainer.stages import plan_stages

RECENT = 20
"""Steps whose times are averaged."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, by its own metrics."""

    step: int
    last_step: int
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    """Seconds to the last step at the present speed."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run as `keepwarm runs` lists it."""

    folder: str
    name: str
    progress: Progress
    job: slurm.Job | None
    """The newest job of the run that SLURM knows."""

    @property
    def state(self) -> str:
        if self.job is not None:
            return self.job.state.lower()
        return "finished" if self.progress.step >= self.progress.last_step else "ended" if self.progress.step else "new"


def slurm_job_of(folder: Path) -> slurm.Job | None:
    """The job of a run that SLURM still knows: the first that has not ended, else the last; None without one.

    Raises:
        ClusterError: it was submitted, and SLURM cannot be asked.
    """
    known = [found for found in map(slurm.job, jobs_of(folder)) if found is not None]
    going = [found for found in known if found.state in slurm.GOING]
    return going[0] if going else known[-1] if known else None


def progress(folder: Path) -> Progress:
    """From the end of metrics.jsonl."""
    job = load_run(RunFolder(folder).run_file)
    steps = [record for record in RunFolder(folder).recent_metrics() if "loss" in record][-RECENT:]
    last_step = plan_stages(job)[-1].end_step
    if not steps:
        return Progress(step=0, last_step=last_step, loss=None, tokens_per_s=None, eta_s=None)
    seconds = statistics.median(record["step_time_s"] for record in steps)
    newest = steps[-1]
    return Progress(
        step=newest["step"],
        last_step=last_step,
        loss=newest["loss"],
        tokens_per_s=newest["tokens"] / seconds,
        eta_s=(last_step - newest["step"]) * seconds,
    )


def runs_in(root: Path) -> list[RunRow]:
    """The runs in a folder and the folders right below it, or the run that the folder is, by name.

    Raises:
        OutputError: there is none.
        ClusterError: one was submitted, and SLURM cannot be asked.
    """
    files = (root / RUN_FILE, *sorted(root.glob(f"*/{RUN_FILE}")))
    folders = [path.parent for path in files if path.is_file()]
    if not folders:
        raise OutputError(f"{root}: there is no run here or right below (no {RUN_FILE})")
    return [_row(folder) for folder in folders]


def _row(folder: Path) -> RunRow:
    name = load_run(RunFolder(folder).run_file).name
    return RunRow(folder=str(folder), name=name, progress=progress(folder), job=slurm_job_of(folder))


def show_runs(root: Path, *, as_json: bool) -> None:
    """Print them; raises as `runs_in`."""
    rows = runs_in(root)
    if as_json:
        print(json.dumps([asdict(row) | {"state": row.state} for row in rows]))
    else:
        print("\n".join(table(rows)))


def table(rows: list[RunRow]) -> Iterator[str]:
    """A line each, below a head."""
    lines = [("RUN", "STATE", "JOB", "NODES", "RESTARTS", "STEP", "LOSS", "TOKENS/S", "LEFT")]
    for row in rows:
        done, job = row.progress, row.job
        lines.append(
            (
                row.folder, row.state, job.id if job else "-", job.nodes if job and job.nodes else "-",
                str(job.restarts) if job else "-", f"{done.step}/{done.last_step}",
                "-" if done.loss is None else f"{done.loss:.4f}",
                "-" if done.tokens_per_s is None else f"{done.tokens_per_s:.0f}",
                "-" if done.eta_s is None else time.strftime("%H:%M:%S", time.gmtime(done.eta_s % 86_400))
                if done.eta_s < 86_400 else f"{done.eta_s / 86_400:.1f} days",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def watch(root: Path, every: float) -> None:
    """Print the table again and again, in its place, until no job of it is going. Raises as `runs_in`."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            rows = runs_in(root)
            live.update(Text("\n".join(table(rows))), refresh=True)
            if not any(row.job is not None and row.job.state in slurm.GOING for row in rows):
                return
            time.sleep(every)


def cancel(folder: Path, *, now: bool) -> str:
    """End a run's jobs, after the step that runs and with the state saved unless `now`; returns what was done.

    Raises:
        ClusterError: no job of the run is going, or SLURM refuses.
    """
    going = _going(folder)
    for job in going:
        if now or job.state != "RUNNING":
            slurm.ask("scancel", job.id)
        else:
            # Without this it would be put back into the queue once its state is saved.
            slurm.ask("scontrol", "update", f"JobId={job.id}", "Requeue=0")
            slurm.ask("scancel", "--signal=USR1", job.id)
    names = ", ".join(job.id for job in going)
    return f"job {names} ends " + (
        "now" if now else f"once its state is saved; keepwarm submit {folder} --resume goes on"
    )


def requeue(folder: Path, *, now: bool) -> str:
    """Put a run's job back into the queue, after the step that runs and with the state saved unless `now`.

    Raises:
        ClusterError: no job of the run is running, or SLURM refuses.
    """
    running = [job for job in _going(folder) if job.state == "RUNNING"]
    if not running:
        raise ClusterError(f"{folder}: no job of this run is running; keepwarm submit {folder} --resume starts one")
    for job in running:
        slurm.ask(*(("scontrol", "requeue", job.id) if now else ("scancel", "--signal=USR1", job.id)))
    return f"job {running[0].id} is requeued " + ("now" if now else "once its state is saved")


def _going(folder: Path) -> list[slurm.Job]:
    if not jobs_of(folder):
        raise ClusterError(f"{folder}: no run was submitted to SLURM from this folder")
    known = [found for found in map(slurm.job, jobs_of(folder)) if found is not None]
    going = [job for job in known if job.state in slurm.GOING]
    if not going:
        raise ClusterError(f"{folder}: no job of this run is pending or running")
    return going
