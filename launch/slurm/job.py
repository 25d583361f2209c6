"""Batch job on the first node of a SLURM allocation: `python -P -m keepwarm.launch.slurm.job RUN`.

Checks the nodes, starts the ranks on as many healthy nodes as the layout needs, and decides when they end whether to
stop, restart on the remaining nodes or requeue the job. Watchers on the other nodes do so if this node dies.
"""

import os
import signal
import sys
from pathlib import Path

from keepwarm.exit_code import ExitCode
from keepwarm.ft.format import publication
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.plan.placement import is_placed, place_job
from keepwarm.launch.run.submission import end_is_asked, read_submission
from keepwarm.launch.slurm import commands, watcher
from keepwarm.launch.slurm.allocation import Allocation
from keepwarm.launch.slurm.domains import domain_of_node, place_argument
from keepwarm.launch.slurm.ending import Ending
from keepwarm.launch.slurm.script import node_step, rank_step, watch_step
from keepwarm.launch.slurm.verdict import Outcome, bounded, fruitless_starts, handed_over, verdict
from keepwarm.side_writer import protect_streams
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.resolved_stages import resolved_stages


def run_job(folder: Path) -> int:
    """Run one start of the batch job and return its exit code."""
    job = load_run(RunFolder(folder).submitted_file)
    here = Allocation(folder, job, commands.host_names(os.environ["SLURM_JOB_NODELIST"]))
    signal.signal(signal.SIGTERM, here.note_end)
    if (ended := handed_over(events.read(folder).events, here.slurm_job)) is not None:
        here.say(ended.why)
        return ended.code
    if _is_finished(here):
        here.say(f"{job.name}: the run is finished")
        return ExitCode.DONE
    step = RunFolder(folder).last_step()
    here.note(events.BatchStarted(slurm_job=here.slurm_job, nodes=tuple(here.nodes), requeues=here.requeues, step=step))
    if len(here.nodes) < job.layout.nodes:
        why = f"the layout has {job.layout.nodes} nodes, SLURM gave {len(here.nodes)}: see cluster.slurm.extra"
        return _give_up(here, ExitCode.BAD_INPUT, why)
    with watcher.watched(here.nodes, lambda address: watch_step(job, folder, here.nodes[1:], address)):
        return _train(here)


def _train(here: Allocation) -> int:
    """Start the ranks until the run or this start of the job has ended; return the exit code."""
    job, folder = here.job, here.folder
    recorded = read_submission(folder)
    resume = recorded is not None and recorded.resume
    failures = attempts = 0
    while True:
        nodes = here.healthy()
        if end_is_asked(folder, here.slurm_job):
            return Ending(folder, here.slurm_job).cancel("cancelled before the ranks were started")
        if len(nodes) < job.layout.nodes:
            return _requeue(here, f"{len(nodes)} of {len(here.nodes)} nodes are fit, the layout has {job.layout.nodes}")
        begun, seen = RunFolder(folder).last_step(), events.size(folder)
        restarts = max(here.requeues + attempts, 1 if begun else 0)
        code, guilty = here.run(next_step(here, nodes, resume=resume, begun=begun > 0, restarts=restarts), restarts)
        if code and _is_finished(here):
            code = ExitCode.DONE  # the nonzero code came from a node lost during the run
        attempts += 1
        failures = 1 if RunFolder(folder).last_step() > begun else failures + 1
        saved = events.read(folder, start=seen).of(events.Interrupted)
        outcome = Outcome(
            code=code,
            crashed=guilty is not None,
            ending="slurm" if here.ending else "user" if end_is_asked(folder, here.slurm_job) else None,
            saved=saved[-1].step if saved else None,
            failures=failures,
            fruitless=_fruitless(here, code),
        )
        what, why = verdict(outcome, job.cluster.max_restarts)
        here.note(events.BatchEnded(slurm_job=here.slurm_job, code=code, verdict=what, why=why))
        here.say(f"the ranks ended with exit code {code}: {what}: {why}")
        if what == "cancel":
            return Ending(folder, here.slurm_job).cancel(why)
        if what == "requeue":
            return _requeue(here, why)
        if what != "again":
            return code or ExitCode.DONE
        if guilty is not None and job.cluster.slurm.launcher == "rank":
            here.blame(guilty)


def _fruitless(here: Allocation, code: int) -> int:
    log = events.read(here.folder).events
    return fruitless_starts(log, here.slurm_job, here.requeues, RunFolder(here.folder).last_step(), code)


def next_step(here: Allocation, nodes: list[str], *, resume: bool, begun: bool, restarts: int) -> list[str]:
    """Return the srun command of the next start."""
    job, folder = here.job, here.folder
    proposal = RunFolder(folder).submitted_file
    spec = proposal.name if proposal.is_file() else RUN_FILE
    if job.cluster.slurm.launcher == "rank":
        here.say(f"{job.name}: starting {job.layout.world_size} ranks on {', '.join(nodes[: job.layout.nodes])}")
        return rank_step(job, folder, nodes[: job.layout.nodes], resume=resume and not restarts, spec=spec)
    here.say(f"{job.name}: starting supervisors on {', '.join(nodes)} for {job.layout.nodes} slots")
    # By the checkpoints themselves: the file that names the newest is only a hint, and a full disk has no room for it.
    saved = bool(publication.checkpoints(RunFolder(folder).checkpoints))
    if begun and not saved:
        # Everything was lost before anything was saved: the run starts over, and so do its metrics.
        RunFolder(folder).metrics_file.unlink()
    return [*node_step(job, folder, nodes, resume=saved, spec=spec), *_place(here, nodes)]


def _place(here: Allocation, nodes: list[str]) -> list[str]:
    """Return the argument that tells each node its slot and domain, if domains decide; log the placement."""
    job = here.job
    if not is_placed(job):
        return []
    try:
        domains = domain_of_node(job.cluster.slurm)
    except (ClusterError, ValueError) as error:
        here.say(f"nodes take any slots, as their failure domains are not known: {error}")
        return []
    if not domains:
        return []
    placement = place_job(job, nodes, domains)
    for line in placement.lines:
        here.say(line)
    return [place_argument(placement)]


def _is_finished(here: Allocation) -> bool:
    """Return whether all steps are recorded, and rank 0 has recorded the end of the run since the last start."""
    last = resolved_stages(here.folder, here.job)[-1].end_step
    told = [type(event) for event in events.read(here.folder).of(events.Began, events.Finished)]
    return told[-1:] == [events.Finished] and RunFolder(here.folder).last_step() >= last


def _give_up(here: Allocation, code: int, why: str) -> int:
    here.note(events.BatchEnded(slurm_job=here.slurm_job, code=code, verdict="give up", why=why))
    here.say(why)
    return code


def _requeue(here: Allocation, why: str) -> int:
    """Requeue the job without the unfit nodes; return the exit code of this process, which SLURM ends before."""
    slurm, code = here.job.cluster.slurm, int(ExitCode.INTERRUPTED)
    what, why = bounded(why, _fruitless(here, code), here.job.cluster.max_restarts)
    ending = Ending(here.folder, here.slurm_job)
    if what == "give up":
        return _give_up(here, ExitCode.UNRECOVERABLE, why)
    if not ending.requeue(why, exclude=[*slurm.exclude, *here.bad], unfit=tuple(here.bad)):
        return ending.time_out(slurm.save_before_limit)
    ending.wait()
    return code


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
