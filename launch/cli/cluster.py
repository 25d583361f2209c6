"""Commands for runs on a cluster. Importing this module loads neither torch nor the planner."""

from pathlib import Path
from typing import Annotated

import typer

from keepwarm.exit_code import ExitCode
from keepwarm.launch.cli.arguments import WITH_OVERRIDES, Force, Job, Overrides, Resume, RunFolder, start_mode

cluster = typer.Typer()

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script and the command without submitting.")]
Chain = Annotated[int, typer.Option("--chain", min=1, help="Number of jobs to submit, each continuing the one before.")]
Sweep = Annotated[
    list[str] | None,
    typer.Option("--sweep", metavar="KEY=[VALUE, VALUE]", help="Submit one run per value, as tasks of one array job."),
]
MaxParallel = Annotated[int | None, typer.Option(min=1, help="Maximum number of sweep runs to execute concurrently.")]
Check = Annotated[
    bool, typer.Option("--check", help="First ask a node, in a short allocation, whether it sees the run folder.")
]
Backend = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="Batch system: slurm, kubernetes or an installed plug-in.")
]
Runs = Annotated[Path, typer.Argument(metavar="FOLDER", help="Run folder, or a folder of run folders.")]
Now = Annotated[bool, typer.Option("--now", help="Stop immediately and discard steps since the last saved state.")]


@cluster.command(context_settings=WITH_OVERRIDES)
def submit(
    job: Job,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    check: Check = False,
    resume: Resume = False,
    force: Force = False,
    chain: Chain = 1,
    sweep: Sweep = None,
    max_parallel: MaxParallel = None,
    backend: Backend = "slurm",
) -> None:
    """Submit a job to a batch system after checking it against its files and the cluster.

    keepwarm submit job.yaml cluster.ranks_per_node=8 cluster.slurm.partition=gpu --dry-run

    keepwarm submit job.yaml cluster.slurm.time=24:00:00 cluster.slurm.spares=1

    keepwarm submit runs/second --resume

    keepwarm submit runs/sweep --resume

    keepwarm submit job.yaml --sweep "stages.0.lr.max=[1e-3, 3e-4]" --sweep "seed=[1, 2, 3]" --max-parallel 2

    keepwarm submit job.yaml --backend kubernetes --dry-run | kubectl apply -f -
    """
    from keepwarm.launch.batch.submit import SubmitOptions, submit_run
    from keepwarm.launch.batch.sweep import resume_sweep, submit_sweep
    from keepwarm.launch.batch.sweep_folder import values_of

    options = SubmitOptions(
        backend=backend,
        mode=start_mode(resume=resume, force=force),
        chain=chain,
        sweep=sweep or (),
        max_parallel=max_parallel,
        probe=check,
        dry_run=dry_run,
    )
    if resume and values_of(job) is not None:
        resume_sweep(job, overrides or [], options)
    else:
        (submit_sweep if options.sweep else submit_run)(job, overrides or [], options)


@cluster.command()
def runs(
    folder: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List runs with job state, nodes, restarts, step, loss, speed and time left."""
    from keepwarm.launch.batch.runs import show_runs

    show_runs(folder, as_json=as_json)


@cluster.command()
def watch(
    folder: Runs = Path("runs"),
    every: Annotated[float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Time between refreshes.")] = 5.0,
) -> None:
    """List runs and refresh the list until none of their jobs is active; exit with code 1 if one has failed."""
    from keepwarm.launch.batch.watch import watch as watch_runs

    if not watch_runs(folder, every):
        raise typer.Exit(ExitCode.FAULT)


@cluster.command()
def logs(
    run: RunFolder,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Show this rank's log instead of the job's.")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Number of lines to show.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new lines until Ctrl-C.")] = False,
) -> None:
    """Print the last lines of a job's log, or of one rank's log; of a sweep, those of each run."""
    from keepwarm.launch.batch.logs import show_log

    show_log(run, rank, lines, follow=follow)


@cluster.command()
def cancel(run: RunFolder, now: Now = False) -> None:
    """Save the state of a run, or of each run of a sweep, and end its job."""
    from keepwarm.launch.batch.jobs import cancel as cancel_run

    print(cancel_run(run, now=now))


@cluster.command()
def requeue(run: RunFolder, now: Now = False) -> None:
    """Save the state of a run, or of each run of a sweep, and put its job back into the queue."""
    from keepwarm.launch.batch.jobs import requeue as requeue_run

    print(requeue_run(run, now=now))
