"""The `keepwarm` command. Importing this module loads neither torch nor the planner: commands import lazily."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from keepwarm import debug, signals
from keepwarm.exit_code import ExitCode
from keepwarm.launch.cli.arguments import (
    PASSED_THROUGH,
    WITH_OVERRIDES,
    Force,
    Job,
    Overrides,
    Resume,
    RunFolder,
    start_mode,
)
from keepwarm.launch.cli.cluster import cluster
from keepwarm.launch.cli.init import first_job
from keepwarm.launch.cli.programs import DATA_PROGRAMS, PROGRAMS, add_programs
from keepwarm.launch.cli.site import site
from keepwarm.side_writer import end_without_stdout, protect_streams
from keepwarm.text import problem_of, problem_of_path

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train large language models in three dimensions of parallelism.

A job is one YAML file. Look at what it would do, then run it:

    keepwarm plan  configs/jobs/demo.yaml

    keepwarm train configs/jobs/demo.yaml

Any value can be changed on the command line:

    keepwarm train job.yaml parallel.tensor=2 stages.0.lr.max=3e-4 output=runs/second

Exit codes: 0 done, 2 bad input, 3 training stopped itself, 4 a fault that could not be recovered, 6 the state could
not be saved, 130 interrupted.
Add `--debug` to any command to see the traceback of an error.
""",
)
data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Prepare training data.

    keepwarm data train-tokenizer --help
""",
)
app.add_typer(data, name="data")
app.add_typer(first_job)
app.add_typer(cluster)
app.add_typer(site, name="site")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"keepwarm {version('keepwarm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=WITH_OVERRIDES)
def plan(
    job: Job,
    overrides: Overrides = None,
    spec: Annotated[
        bool, typer.Option("--spec", help="Also print the resolved spec: every key with its value.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    png: Annotated[Path | None, typer.Option("--png", help="Also plot learning rate and mixture to this file.")] = None,
    find: Annotated[
        bool, typer.Option("--find", help="Find the layouts in which the job trains fastest, for --gpus and --gpu.")
    ] = False,
    gpus: Annotated[int | None, typer.Option(min=1, max=2**17, help="--find: number of GPUs.")] = None,
    gpu: Annotated[str | None, typer.Option(help="--find: kind of GPU: A100, H100, H200 or B200.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="--find: GPUs of a node. [default: 8]")] = None,
    write: Annotated[
        Path | None, typer.Option(help="--find: write the job in the fastest layout to this new file.")
    ] = None,
) -> None:
    """Show a job's rank layout, parameters, memory, steps and learning rates without starting anything.

    keepwarm plan configs/jobs/mt-nlg-530b.yaml

    keepwarm plan job.yaml --spec

    keepwarm plan job.yaml parallel.pipeline=4 --json

    keepwarm plan job.yaml --find --gpus 64 --gpu H100 --write found.yaml
    """
    import json

    from keepwarm.launch.plan.plan import Plan
    from keepwarm.trainer.job.files import load_job

    if find:
        from keepwarm.launch.plan.find import Request, find_layouts

        request = Request(gpus=gpus, gpu=gpu, gpus_per_node=gpus_per_node, write=write, as_json=as_json)
        find_layouts(load_job(job, overrides or []), request)
        return
    if gpus is not None or gpu is not None or gpus_per_node is not None or write is not None:
        raise typer.BadParameter("--gpus, --gpu, --gpus-per-node and --write belong to --find")
    made = Plan(load_job(job, overrides or []))
    if png is not None:
        from keepwarm.launch.plan.plot import draw_plan

        draw_plan(made, png)
    if as_json:
        typer.echo(json.dumps(made.data()))
    else:
        from keepwarm.launch.plan.text import print_plan

        print_plan(made, spec=spec)


@app.command(context_settings=WITH_OVERRIDES)
def train(
    job: Job,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Force = False,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Emulate the layout's nodes, each with its own supervisor.")
    ] = None,
    spares: Annotated[
        int, typer.Option("--spares", min=0, max=64, help="Number of nodes that wait to replace a lost one.")
    ] = 0,
) -> None:
    """Run a job on this machine: start its ranks, wait for them and exit with their code.

        keepwarm train configs/jobs/demo.yaml

        keepwarm train job.yaml parallel.data=2 output=runs/second

        keepwarm train runs/second --resume

        keepwarm train ci/snapshot --nodes 4 --spares 1

    The same run under another launcher, from the run.json that the first start wrote:

        torchrun --nproc-per-node 8 -m keepwarm.trainer runs/second/run.json
    """
    from keepwarm.launch.local.train import train_here

    train_here(job, overrides or [], start_mode(resume=resume, force=force), nodes=nodes, spares=spares)


@app.command(context_settings=WITH_OVERRIDES)
def branch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder; it is not changed.")],
    at: Annotated[int, typer.Option("--at", min=1, help="Step of the checkpoint, in a constant phase.")],
    anneal: Annotated[int, typer.Option("--anneal", min=1, help="Tokens over which the learning rate decays.")],
    overrides: Overrides = None,
) -> None:
    """Start a new run from a checkpoint in another run's constant phase and anneal it for a release.

    keepwarm branch runs/base --at 6000 --anneal 2_000_000_000

    keepwarm branch runs/base --at 6000 --anneal 2_000_000_000 stages.0.mixture="{web: 3, code: 1}" output=runs/release
    """
    from keepwarm.launch.cli.branch import branch_here

    branch_here(run, at, anneal, overrides or [])


@app.command(context_settings=PASSED_THROUGH)
def simulate(context: typer.Context) -> None:
    """Simulate goodput and survival of codes, replicas, disk and spares on 8 to 100,000 GPUs."""
    from keepwarm.launch.simulation.command import main as run

    run(context.args)


@app.command(context_settings=PASSED_THROUGH)
def drill(context: typer.Context) -> None:
    """Inject faults into a run and compare the result with that of an uninterrupted run."""
    from keepwarm.launch.drill.command import main as run

    run(context.args)


@app.command()
def status(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the progress of a run and where its time went.

    keepwarm status runs/demo

    keepwarm status runs/demo --json
    """
    from keepwarm.launch.cli.status import show

    show(run, as_json=as_json)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Show which engines and fused kernels this machine can use and how to install the missing ones."""
    from keepwarm.launch.cli.doctor import show

    show(as_json=as_json)


@app.command()
def snapshots(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the snapshots that a run's agents hold in this machine's memory.

    keepwarm snapshots runs/demo

    keepwarm snapshots runs/demo --json
    """
    from keepwarm.launch.cli.snapshots import show

    show(run, as_json=as_json)


@app.command()
def drain(
    run: RunFolder,
    node: Annotated[str, typer.Argument(metavar="NODE", help="Name of the node, or its slot.")],
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="How long to wait for it.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Have a node leave a run without losing a step, for maintenance or before it is taken away.

    All ranks finish their step and commit a snapshot of it in memory. Then a spare takes the node's slot, or the run
    shrinks if the job allows it, and the node's supervisor ends with exit code 0. The names and slots of the nodes are
    those of `keepwarm status`; a node of the same name may join again later.

    keepwarm drain runs/demo node-1

    keepwarm drain runs/demo 1 --timeout 60 --json

    Exit codes: 0 the run trains without the node, 1 not in time (the node stays), 2 the node cannot leave: there is no
    such node, no spare, or the run is restarting.
    """
    from keepwarm.launch.cli.drain import drain as drain_node

    drain_node(run, node, timeout=timeout, as_json=as_json)


add_programs(app, PROGRAMS)
add_programs(data, DATA_PROGRAMS)


def main() -> None:
    """Entry point. Report errors as one message on stderr and an exit code; show a traceback only on request."""
    from keepwarm.launch.errors import LaunchError
    from keepwarm.parallel.errors import ParallelError
    from keepwarm.trainer.errors import TrainerError

    protect_streams(2)
    end_without_stdout()
    signals.handle((signal.SIGINT,), lambda number, frame: sys.exit(ExitCode.INTERRUPTED))
    if "--debug" in sys.argv:  # of every command, and of the programs that some of them become
        sys.argv.remove("--debug")
        os.environ[debug.VARIABLE] = "1"
    if (wrong := problem_of(sys.argv[1:])) is not None:
        print(f"keepwarm: {wrong}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    try:
        app(prog_name="keepwarm")
    except (LaunchError, TrainerError, ParallelError) as error:
        if debug.wants_traceback():
            traceback.print_exc()
        elif str(error):
            print(f"keepwarm: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", ExitCode.BAD_INPUT))
    except OSError as error:
        if debug.wants_traceback() or (said := problem_of_path(error)) is None:
            raise
        print(f"keepwarm: {said}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    finally:
        sys.stdout.flush()  # a failure here is the command's; one at the interpreter's end would go unnoticed
