"""What runs on the first node of a SLURM allocation: `python -P -m keepwarm.launch.slurm.job RUN`.

Checks the nodes, starts the ranks on as many healthy ones as the layout has, and decides what follows when they end:
nothing, the same again on the nodes that are left, or a requeue of the job.
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
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.stages import plan_stages
from keepwarm.trainer.monitor import events

REQUEUE_GRACE_S = 60.0
"""Seconds that SLURM has to end this process once it has put the job back into the queue."""

Verdict = Literal["done", "again", "requeue", "give up"]
_POLITE = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def verdict(code: int, *, crashed: bool, ending: bool, failures: int, limit: int) -> tuple[Verdict, str]:
    """What follows when the ranks ended with `code`, and why. Pure.

    Args:
        code: of srun, the largest of its tasks; 128 + n when a signal ended it.
        crashed: a task ended by itself first; what srun did to the others then says nothing.
        ending: SLURM ends the job by itself, by scancel, preemption or requeue: what comes next is its decision.
        failures: starts in a row, this one included, that failed without a step in between.
        limit: of `failures`.
    """
    if code == ExitCode.DONE:
        return "done", "finished"
    if ending:
        return "give up", "SLURM ends the job"
    if not crashed and (code == ExitCode.INTERRUPTED or code in [128 + number for number in _POLITE]):
        return "requeue", "the state is saved, the time limit is near or somebody asked for it"
    if code in (ExitCode.BAD_INPUT, ExitCode.TRAINING_STOPPED):
        return "give up", "bad input" if code == ExitCode.BAD_INPUT else "training stopped itself"
    if failures > limit:
        return "give up", f"{failures} starts in a row failed without a step (cluster.max_restarts = {limit})"
    return "again", f"ranks ended with exit code {code}"


def run_job(folder: Path) -> int:
    """The whole life of one start of the job; its exit code."""
    job = load_run(RunFolder(folder).run_file)
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
        if code and RunFolder(folder).last_step() >= plan_stages(job)[-1].end_step and _finished(folder):
            code = ExitCode.DONE  # of a node that was lost on the way
        attempts += 1
        failures = 1 if RunFolder(folder).last_step() > begun else failures + 1
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
    """The srun command of the next start."""
    job, folder = here.job, here.folder
    if job.cluster.slurm.launcher == "rank":
        here.say(f"{job.name}: starting {job.layout.world_size} ranks on {', '.join(nodes[: job.layout.nodes])}")
        return rank_step(job, folder, nodes[: job.layout.nodes], resume=resume and not restarts)
    here.say(f"{job.name}: starting supervisors on {', '.join(nodes)} for {job.layout.nodes} slots")
    saved = (RunFolder(folder).checkpoints / "latest").exists()
    if begun and not saved:
        # Nothing was saved before everything was lost: the run begins anew, and so does its record.
        RunFolder(folder).metrics_file.unlink()
    return node_step(job, folder, nodes, resume=saved)


def _finished(folder: Path) -> bool:
    """Whether rank 0 has said so since the last start."""
    told = [type(event) for event in events.read(folder).of(events.Began, events.Finished)]
    return told[-1:] == [events.Finished]


def _requeue(here: Allocation, why: str) -> int:
    """Put the job back into the queue, without the nodes that are not fit; it goes on from where it is saved."""
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
            # Only now: a running job that has lost a node cannot be changed where nothing keeps accounts.
            commands.ask("scontrol", "update", f"JobId={identity}", f"ExcNodeList={excluded}")
        except ClusterError as error:
            here.say(f"the next start may get {excluded} again: {error}")
    # SLURM ends this process now; until it says so the job must not end by itself.
    signal.sigtimedwait([signal.SIGTERM], REQUEUE_GRACE_S)
    return ExitCode.INTERRUPTED


def main() -> None:
    """Entry point."""
    try:
        sys.exit(run_job(Path(sys.argv[1])))
    except (ClusterError, SpecError) as error:
        print(f"keepwarm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
