"""SLURM batch system."""

import shutil
from pathlib import Path

import keepwarm
from keepwarm.launch.batch_system import BatchJob, BatchSystem, Phase, Request
from keepwarm.launch.slurm import commands
from keepwarm.launch.slurm.check import check_offered, probe
from keepwarm.launch.slurm.script import CODE, SCRIPT, chain_options, render
from keepwarm.trainer.job.cluster import SlurmSpec


class Slurm(BatchSystem):
    """Submits jobs with sbatch; queries and ends them with scontrol and scancel."""

    name = "slurm"
    title = "SLURM"
    Options = SlurmSpec
    script = SCRIPT
    has_chains = True
    has_arrays = True

    def check(self, request: Request, *, dry_run: bool) -> list[str]:
        return check_offered(request.job, dry_run=dry_run)

    def render(self, request: Request) -> str:
        return render(request.job, request.folder, array=request.array)

    def command(self, request: Request) -> list[str]:
        chain = chain_options(request.job, request.folder) if request.chain > 1 else []
        return ["sbatch", "--parsable", f"--chdir={request.folder}", *chain, str(request.folder / SCRIPT)]

    def stage(self, request: Request, folder: Path) -> list[str]:
        _copy_code(request)
        return probe(request.job, folder)

    def submit(self, request: Request) -> str:
        return commands.ask(*self.command(request)).strip().partition(";")[0]

    def state(self, job_id: str) -> BatchJob | None:
        found = commands.job(job_id)
        return None if found is None else _batch_job(found)

    def cancel(self, job: BatchJob, *, now: bool) -> None:
        if now or job.phase != "running":
            commands.ask("scancel", job.id)
        else:
            # Otherwise the job would be requeued once its state is saved.
            commands.ask("scontrol", "update", f"JobId={job.id}", "Requeue=0")
            commands.ask("scancel", "--signal=USR1", job.id)

    def requeue(self, job: BatchJob, *, now: bool) -> None:
        commands.ask(*(("scontrol", "requeue", job.id) if now else ("scancel", "--signal=USR1", job.id)))


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
