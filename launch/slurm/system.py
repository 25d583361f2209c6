"""SLURM batch system."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import keepwarm
from keepwarm.launch.batch_system import BatchJob, BatchSystem, Phase, Request
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.slurm import commands
from keepwarm.launch.slurm.check import check_offered, completed, probe
from keepwarm.launch.slurm.script import CODE, OWN_STEPS, SCRIPT, render
from keepwarm.trainer.job.cluster import SlurmSpec
from keepwarm.trainer.job.spec import JobSpec


class Slurm(BatchSystem):
    """Submits jobs with sbatch; queries and ends them with scontrol and scancel."""

    name = "slurm"
    title = "SLURM"
    Options = SlurmSpec
    script = SCRIPT
    has_chains = True
    has_arrays = True

    def completed(self, jobs: Sequence[JobSpec], *, dry_run: bool) -> list[JobSpec]:
        return completed(jobs, dry_run=dry_run)

    def check(self, request: Request, *, dry_run: bool) -> list[str]:
        return check_offered(request.job, dry_run=dry_run)

    def render(self, request: Request) -> str:
        return render(request.job, request.folder, array=request.array)

    def command(self, request: Request) -> list[str]:
        dependency = [] if request.after is None else [f"--dependency=afterany:{request.after}"]
        return ["sbatch", "--parsable", f"--chdir={request.folder}", *dependency, str(request.folder / SCRIPT)]

    def stage(self, request: Request, folder: Path) -> list[str]:
        _copy_code(request)
        return probe(request.job, folder) if request.probe else []

    def submit(self, request: Request) -> str:
        return commands.ask(*self.command(request)).strip().partition(";")[0]

    def state(self, job_id: str) -> BatchJob | None:
        found = commands.job(job_id) or commands.accounted(job_id)
        return None if found is None else _batch_job(found)

    def cancel(self, job: BatchJob, *, now: bool) -> None:
        # The job itself ends when the ranks have saved; `ask_for_end` tells it not to be requeued.
        commands.ask(*(("scancel", job.id) if now or job.phase != "running" else ("scancel", "--signal=USR1", job.id)))

    def requeue(self, job: BatchJob, *, now: bool) -> bool:
        found = commands.job(job.id)
        if found is not None and not found.requeueable:
            raise ClusterError(
                f"SLURM may not requeue job {job.id} (Requeue=0): end it with keepwarm cancel and continue with "
                "keepwarm submit RUN --resume"
            )
        saves = not now and bool(set(commands.steps(job.id)) - {*OWN_STEPS})
        commands.ask(*(("scancel", "--signal=USR1", job.id) if saves else ("scontrol", "requeue", job.id)))
        return saves


def _batch_job(job: commands.Job) -> BatchJob:
    phase: Phase = "running" if job.state == "RUNNING" else "pending" if job.state in commands.GOING else "ended"
    return BatchJob(
        id=job.id,
        phase=phase,
        state=job.state.lower(),
        reason=job.reason,
        nodes=job.nodes,
        restarts=job.restarts,
        run_time=job.run_time,
        time_limit=job.time_limit,
        # The controller reports 0 for a job that has not ended, and that of the last start for one that was requeued.
        exit_code=job.exit_code if phase == "ended" else None,
    )


def _copy_code(request: Request) -> None:
    """Copy the running code into the run folder, if the job requests it, for the nodes to run.

    Replaces the copy of an earlier submission.
    """
    copy = request.folder / CODE
    if copy.is_dir():
        shutil.rmtree(copy)
    if request.job.cluster.slurm.copy_code:
        source = Path(keepwarm.__file__).parent
        shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__"))
