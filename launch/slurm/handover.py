"""Settle what becomes of a job whose batch script has died with its node."""

import os
from pathlib import Path
from typing import Literal

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.node.record import redirect_output
from keepwarm.launch.run.submission import end_is_asked
from keepwarm.launch.slurm import commands
from keepwarm.launch.slurm.ending import Ending
from keepwarm.launch.slurm.script import LOG, OWN_STEPS
from keepwarm.launch.slurm.verdict import Outcome, Verdict, bounded, fruitless_starts, verdict
from keepwarm.side_writer import attempt
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.monitor import events

DIED = "the first node, which ran the batch script, died"


def settle(folder: Path, slurm_job: str, code: int | None) -> bool:
    """End or requeue the job, unless the run goes on without this node; return whether that is done, by this call or
    by SLURM or another watcher before.

    Args:
        code: exit code of this node's last supervisor; None if there was none, or it was killed.
    """
    ending = Ending(folder, slurm_job)
    with attempt("job log"):
        redirect_output(RunFolder(folder).logs / LOG.replace("%j", os.environ["SLURM_JOB_ID"]))
    try:
        job = commands.job(slurm_job)
        if job is None or job.state != "RUNNING" or job.restarts != _restarts():
            return True
        if _is_excluded(folder, slurm_job) and set(commands.steps(slurm_job)) - {*OWN_STEPS}:
            return False
    except ClusterError as error:
        ending.say(f"{DIED}, and SLURM cannot be asked: {error}")
        return False
    log = events.read(folder).events
    what, why = _verdict(folder, slurm_job, code, log)
    number = ExitCode.FAULT if code is None else code
    events.append(folder, events.BatchEnded(slurm_job=slurm_job, code=number, verdict=what, why=why))
    if what == "cancel" or not ending.requeue(why, last=what in ("done", "give up")):
        ending.cancel(why)
    return True


def _verdict(folder: Path, slurm_job: str, code: int | None, log: tuple[events.Event, ...]) -> tuple[Verdict, str]:
    limit = load_run(RunFolder(folder).submitted_file).cluster.max_restarts
    step = RunFolder(folder).last_step()
    ending: Literal["user"] | None = "user" if end_is_asked(folder, slurm_job) else None
    fruitless = fruitless_starts(log, slurm_job, _restarts(), step, code or 0)
    what, why = verdict(
        Outcome(
            code=ExitCode.FAULT if code is None else code,
            ending=ending,
            saved=saved_by(log, slurm_job),
            fruitless=fruitless,
        ),
        limit,
    )
    if what == "again":
        return bounded(DIED, fruitless, limit)
    return what, f"{why} ({DIED})"


def saved_by(log: tuple[events.Event, ...], slurm_job: str) -> int | None:
    """Return the step of the state that was saved since the last start of a job. Pure."""
    saved = None
    for event in log:
        if isinstance(event, events.BatchStarted) and event.slurm_job == slurm_job:
            saved = None
        elif isinstance(event, events.Interrupted):
            saved = event.step
    return saved


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _is_excluded(folder: Path, slurm_job: str) -> bool:
    """Return whether the run was to continue without this node."""
    own, excluded = os.environ.get("SLURMD_NODENAME"), False
    for event in events.read(folder).events:
        if isinstance(event, events.BatchStarted) and event.slurm_job == slurm_job:
            excluded = False
        elif isinstance(event, events.NodeExcluded) and event.host == own:
            excluded = True
    return excluded
