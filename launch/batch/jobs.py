"""Find, cancel and requeue the jobs of a run in its batch system."""

from pathlib import Path
from shlex import quote

from keepwarm.launch.batch.sweep_folder import runs_of
from keepwarm.launch.batch_system import BATCH_SYSTEMS, BatchJob, BatchSystem, batch_system
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.run.submission import ask_for_end, read_submission
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
    """End the jobs of a run or of all runs of a sweep, after the current step and with the state saved unless `now`;
    return a message.

    Raises:
        ClusterError: no job is active, or the batch system refuses.
    """
    said = []
    for run, system, job in _active(folder, "cancel"):
        if job.phase == "running" and not now:
            _mark(run, job)
            said.append(
                f"job {job.id} ends once its state is saved; keepwarm submit {quote(str(run))} --resume continues"
            )
        else:
            said.append(f"job {job.id} ends now" if job.phase == "running" else f"job {job.id} will not start")
        system.cancel(job, now=now)
    return "\n".join(said)


def requeue(folder: Path, *, now: bool) -> str:
    """Put the running jobs of a run or of a sweep back into the queue, after the current step and with the state saved
    unless `now`; return a message.

    Raises:
        ClusterError: no job is running, or the batch system refuses.
    """
    running = [each for each in _active(folder, "requeue") if each[2].phase == "running"]
    if not running:
        raise ClusterError(
            f"{folder}: no job of this run is running; keepwarm submit {quote(str(folder))} --resume starts one"
        )
    said = []
    for _, system, job in running:
        saves = system.requeue(job, now=now) is not False and not now
        said.append(f"job {job.id} is requeued " + ("once its state is saved" if saves else "now"))
    return "\n".join(said)


def advice(folder: Path, command: str) -> str:
    """Return advice in place of `keepwarm COMMAND` for a run not submitted from its folder; may be empty."""
    if not RunFolder(folder).exists:
        return ""
    job = load_run(RunFolder(folder).run_file)
    asked = [batch_system(name) for name in BATCH_SYSTEMS.names() if job.cluster.batch_options(name) is not None]
    found = [(system.title, text) for system in asked if (text := system.advice(job, command)) is not None]
    return "".join(f"; if it runs on {title}: {text}" for title, text in found)


def _active(folder: Path, command: str) -> list[tuple[Path, BatchSystem, BatchJob]]:
    """Return the active jobs of a run, or of all runs of a sweep, each with its run folder."""
    runs = runs_of(folder)
    recorded = {run: record for run in runs if (record := read_submission(run)) is not None and record.jobs}
    if not recorded:
        raise ClusterError(f"{folder}: no run was submitted from this folder{advice(folder, command)}")
    found = [
        (run, batch_system(record.batch_system), job)
        for run, record in recorded.items()
        for job in jobs_of(run)
        if job.active
    ]
    if not found:
        raise ClusterError(f"{folder}: no job of this run is pending or running")
    return found


def _mark(run: Path, job: BatchJob) -> None:
    try:
        ask_for_end(run, job.id)
    except OSError as error:
        raise ClusterError(
            f"{run}: cannot be written ({error.strerror}), so that job {job.id} would run again once its state is "
            "saved; --now ends it without saving"
        ) from error
