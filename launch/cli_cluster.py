"""The commands for runs on a cluster. Importing this loads neither torch nor what they plan with."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.cli_arguments import WITH_OVERRIDES, Debug, Job, Overrides, RunFolder

cluster = typer.Typer()
Now = Annotated[bool, typer.Option("--now", help="At once, without the steps since the last saved state.")]


@cluster.command(context_settings=WITH_OVERRIDES)
def submit(
    job: Job,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script and the command, submit nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Empty the output folder and start anew.")] = False,
    chain: Annotated[int, typer.Option("--chain", min=1, help="Jobs that continue one another.")] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=[VALUE, VALUE]", help="A run for each value, as tasks of one array job."),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="Runs of a sweep that go on at the same time, at most.")
    ] = None,
    backend: Annotated[
        Literal["slurm", "kubernetes"], typer.Option("--backend", help="kubernetes: with --dry-run, for kubectl.")
    ] = "slurm",
    debug: Debug = False,
) -> None:
    """Hand a job to SLURM, after checking it against its files and the cluster; or print it for Kubernetes.

    keepwarm submit job.yaml cluster.ranks_per_node=8 cluster.slurm.partition=gpu --dry-run

    keepwarm submit job.yaml cluster.slurm.time=24:00:00 cluster.slurm.spares=1

    keepwarm submit runs/second --resume

    keepwarm submit job.yaml --sweep "stages.0.lr.max=[1e-3, 3e-4]" --sweep "seed=[1, 2, 3]" --at-once 2

    keepwarm submit job.yaml --backend kubernetes --dry-run | kubectl apply -f -
    """
    from launch.submit import show_manifests, submit_here

    if backend == "kubernetes":
        if not dry_run or resume or force or sweep or chain > 1:
            raise typer.BadParameter(
                "--backend kubernetes takes --dry-run alone: what it prints is for `kubectl apply -f -`"
            )
        show_manifests(job, overrides or [])
        return
    if resume and force:
        raise typer.BadParameter("--resume continues a run and --force starts it anew: give one of them")
    if sweep:
        from launch.sweep import submit_sweep

        if resume or force or chain > 1:
            raise typer.BadParameter("--sweep starts new runs; continue one with keepwarm submit SWEEP/0 --resume")
        submit_sweep(job, overrides or [], sweep, at_once=at_once, dry_run=dry_run)
        return
    mode: Literal["new", "resume", "force"] = "resume" if resume else "force" if force else "new"
    submit_here(job, overrides or [], mode, chain=chain, dry_run=dry_run)


@cluster.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run, or a folder of runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    debug: Debug = False,
) -> None:
    """List runs: state of their SLURM job, nodes, restarts, step, loss, speed, time left."""
    from launch.runs import show_runs

    show_runs(folder, as_json=as_json)


@cluster.command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run, or a folder of runs.")] = Path("runs"),
    every: Annotated[float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Between two looks.")] = 5.0,
    debug: Debug = False,
) -> None:
    """List runs again and again, until none of their jobs is going."""
    from launch.runs import watch as watch_runs

    watch_runs(folder, every)


@cluster.command()
def logs(
    run: RunFolder,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Of this rank; default: of the job.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="From the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added.")] = False,
    debug: Debug = False,
) -> None:
    """Print the end of the log of a run's SLURM job, or of one of its ranks."""
    from launch.logs import show_log

    show_log(run, rank, lines, follow=follow)


@cluster.command()
def cancel(run: RunFolder, now: Now = False, debug: Debug = False) -> None:
    """End a run's SLURM job, with its state saved."""
    from launch.runs import cancel as cancel_run

    print(cancel_run(run, now=now))


@cluster.command()
def requeue(run: RunFolder, now: Now = False, debug: Debug = False) -> None:
    """Put a run's SLURM job back into the queue, with its state saved."""
    from launch.runs import requeue as requeue_run

    print(requeue_run(run, now=now))
