"""Batch job on the first node of a SLURM allocation: `python -P -m keepwarm.launch.slurm.job RUN`.

Checks the nodes, starts the ranks on as many healthy nodes as the layout needs, and decides when they end whether to
stop, restart on the remaining nodes or requeue the job.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Literal

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.run.submission import read_submission
from keepwarm.launch.slurm import commands
from keepwarm.launch.slurm.allocation import Allocation
from keepwarm.launch.slurm.script import node_step, rank_step
from keepwarm.side_writer import protect_streams
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.resolved_stages import resolved_stages

REQUEUE_GRACE_S = 60.0
"""Seconds to wait for SLURM to end this process after requeueing the job."""

Verdict = Literal["done", "again", "requeue", "give up"]
_POLITE = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def verdict(code: int, *, crashed: bool, ending: bool, failures: int, limit: int) -> tuple[Verdict, str]:
    """Decide what follows after the ranks exited with `code`, and give the reason. Pure.

    Args:
        code: exit code of srun, the largest of its tasks' codes; 128 + n if signal n ended it.
        crashed: whether a task failed on its own first; srun's treatment of the others is then irrelevant.
        ending: whether SLURM is ending the job (scancel, preemption or requeue) and so decides what comes next.
        failures: consecutive starts, including this one, that failed without completing a step.
        limit: maximum of `failures`.
    """
    if code == ExitCode.DONE:
        return "done", "finished"
    if ending:
        return "give up", "SLURM ends the job"
    if not crashed and (code == ExitCode.INTERRUPTED or code in [128 + number for number in _POLITE]):
        return "requeue", "the state is saved: the time limit is near, or a user asked for the end"
    if code == ExitCode.STATE_NOT_SAVED and failures <= limit:
        return "requeue", "the state could not be saved, as on a full disk; a later start repeats the steps"
    if code in (ExitCode.BAD_INPUT, ExitCode.TRAINING_STOPPED):
        return "give up", "bad input" if code == ExitCode.BAD_INPUT else "training stopped itself"
    if failures > limit:
        return "give up", f"{failures} starts in a row failed without a step (cluster.max_restarts = {limit})"
    return "again", f"ranks ended with exit code {code}"


def run_job(folder: Path) -> int:
    """Run one start of the batch job and return its exit code."""
    job = load_run(RunFolder(folder).submitted_file)
    here = Allocation(folder, job, commands.host_names(os.environ["SLURM_JOB_NODELIST"]))
    signal.signal(signal.SIGTERM, here.note_end)
    requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    here.note(events.BatchStarted(slurm_job=here.slurm_job, nodes=tuple(here.nodes), requeues=requeues))
    recorded = read_submission(folder)
    resume = recorded is not None and recorded.resume
    failures = attempts = 0
    while True:
        nodes = here.healthy()
        if len(nodes) < job.layout.nodes:
            return _requeue(here, f"{len(nodes)} of {len(here.nodes)} nodes are fit, the layout has {job.layout.nodes}")
        begun = RunFolder(folder).last_step()
        restarts = max(requeues + attempts, 1 if begun else 0)
        code, guilty = here.run(_step(here, nodes, resume=resume, begun=begun > 0, restarts=restarts), restarts)
        if code and RunFolder(folder).last_step() >= resolved_stages(folder, job)[-1].end_step and _finished(folder):
            code = ExitCode.DONE  # the nonzero code came from a node lost during the run
        attempts += 1
        failures = 1 if RunFolder(folder).last_step() > begun else failures + 1
        if code == ExitCode.STATE_NOT_SAVED:
            failures = 1 + _unsaved(folder)
        what, why = verdict(
            code,
            crashed=guilty is not None,
            ending=here.ending,
            failures=failures,
            limit=job.cluster.max_restarts,
        )
        here.note(events.BatchEnded(slurm_job=here.slurm_job, code=code, verdict=what, why=why))
        here.say(f"the ranks ended with exit code {code}: {what}: {why}")
        if what == "requeue":
            return _requeue(here, why)
        if what != "again":
            return code
        if guilty is not None and job.cluster.slurm.launcher == "rank":
            here.blame(guilty)


def _step(here: Allocation, nodes: list[str], *, resume: bool, begun: bool, restarts: int) -> list[str]:
    """Return the srun command of the next start."""
    job, folder = here.job, here.folder
    proposal = RunFolder(folder).submitted_file
    spec = proposal.name if proposal.is_file() else RUN_FILE
    if job.cluster.slurm.launcher == "rank":
        here.say(f"{job.name}: starting {job.layout.world_size} ranks on {', '.join(nodes[: job.layout.nodes])}")
        return rank_step(job, folder, nodes[: job.layout.nodes], resume=resume and not restarts, spec=spec)
    here.say(f"{job.name}: starting supervisors on {', '.join(nodes)} for {job.layout.nodes} slots")
    saved = (RunFolder(folder).checkpoints / "latest").exists()
    if begun and not saved:
        # Everything was lost before anything was saved: the run starts over, and so do its metrics.
        RunFolder(folder).metrics_file.unlink()
    return node_step(job, folder, nodes, resume=saved, spec=spec)


def _finished(folder: Path) -> bool:
    """Return whether rank 0 has recorded the end of the run since the last start."""
    told = [type(event) for event in events.read(folder).of(events.Began, events.Finished)]
    return told[-1:] == [events.Finished]


def _unsaved(folder: Path) -> int:
    """Return how many starts before this one, in earlier requeues too, ended in a row without their state saved."""
    codes = [event.code for event in events.read(folder).of(events.BatchEnded)]
    return next((count for count, code in enumerate(reversed(codes)) if code != ExitCode.STATE_NOT_SAVED), len(codes))


def _requeue(here: Allocation, why: str) -> int:
    """Requeue the job without the unfit nodes; it resumes from its saved state."""
    identity = here.slurm_job
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        commands.ask("scontrol", "requeue", identity)
        here.note(events.Requeue(slurm_job=identity, why=why, excluded=tuple(sorted(here.bad))))
        here.say(f"requeued: {why}")
    except ClusterError as error:
        here.say(f"not requeued: {error}; keepwarm submit {here.folder} --resume goes on from the saved state")
        return ExitCode.INTERRUPTED
    if here.bad:
        excluded = ",".join([*here.job.cluster.slurm.exclude, *here.bad])
        try:
            # Only after the requeue: without accounting, SLURM cannot update a running job that has lost a node.
            commands.ask("scontrol", "update", f"JobId={identity}", f"ExcNodeList={excluded}")
        except ClusterError as error:
            here.say(f"the next start may get {excluded} again: {error}")
    # SLURM will end this process; the job must not exit on its own before that.
    signal.sigtimedwait([signal.SIGTERM], REQUEUE_GRACE_S)
    return ExitCode.INTERRUPTED


def main() -> None:
    """Entry point."""
    protect_streams()
    try:
        sys.exit(run_job(Path(sys.argv[1])))
    except (ClusterError, SpecError) as error:
        print(f"keepwarm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
