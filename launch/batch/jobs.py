"""Find, cancel and requeue the jobs of a run in its batch system."""

from pathlib import Path

from keepwarm.launch.batch_system import BATCH_SYSTEMS, BatchJob, BatchSystem, batch_system
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.run.submission import read_submission
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RunFolder


def jobs_of(folder: Path) -> list[BatchJob]:
    """Return the run's jobs that its batch system still knows, oldest first; empty if it was never submitted.

    Raises:
        ClusterError: the run was submitted, but its batch system cannot be queried.
    """
    recorded = read_submission(folder)
    if recorded is None:
        return []
    system = batch_system(recorded.batch_system)
    return [job for job in map(system.state, recorded.jobs) if job is not None]


def cancel(folder: Path, *, now: bool) -> str:
    """End a run's jobs, after the current step and with the state saved unless `now`; return a message.

    Raises:
        ClusterError: no job of the run is active, or the batch system refuses.
    """
    system = _system(folder, "cancel")
    jobs = _active(folder)
    for job in jobs:
        system.cancel(job, now=now)
    names = ", ".join(job.id for job in jobs)
    return f"job {names} ends " + (
        "now" if now else f"once its state is saved; keepwarm submit {folder} --resume goes on"
    )


def requeue(folder: Path, *, now: bool) -> str:
    """Put a run's job back into the queue, after the current step and with the state saved unless `now`.

    Raises:
        ClusterError: no job of the run is running, or the batch system refuses.
    """
    system = _system(folder, "requeue")
    running = [job for job in _active(folder) if job.phase == "running"]
    if not running:
        raise ClusterError(f"{folder}: no job of this run is running; keepwarm submit {folder} --resume starts one")
    for job in running:
        system.requeue(job, now=now)
    return f"job {running[0].id} is requeued " + ("now" if now else "once its state is saved")


def advice(folder: Path, command: str) -> str:
    """Return advice in place of `keepwarm COMMAND` for a run not submitted from its folder; may be empty."""
    if not RunFolder(folder).exists:
        return ""
    job = load_run(RunFolder(folder).run_file)
    asked = [batch_system(name) for name in BATCH_SYSTEMS.names() if job.cluster.batch_options(name) is not None]
    found = [(system.title, text) for system in asked if (text := system.advice(job, command)) is not None]
    return "".join(f"; if it runs on {title}: {text}" for title, text in found)


def _system(folder: Path, command: str) -> BatchSystem:
    recorded = read_submission(folder)
    if recorded is None or not recorded.jobs:
        raise ClusterError(f"{folder}: no run was submitted from this folder{advice(folder, command)}")
    return batch_system(recorded.batch_system)


def _active(folder: Path) -> list[BatchJob]:
    active = [job for job in jobs_of(folder) if job.active]
    if not active:
        raise ClusterError(f"{folder}: no job of this run is pending or running")
    return active
