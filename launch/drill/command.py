"""`keepwarm drill`: inject scripted faults into a run and compare it with an uninterrupted one."""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from keepwarm import signals
from keepwarm.exit_code import ExitCode
from keepwarm.launch.drill import campaign, faults
from keepwarm.launch.drill.faults import Action, Fault, Stage
from keepwarm.launch.drill.report import print_result, write_html
from keepwarm.launch.errors import DrillError, RanksFailed
from keepwarm.launch.run.preflight import check_job
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import plan_stages

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
DRAWN_SPARES = 3
"""Number of spare nodes assumed when faults are drawn and --spares is not given."""
_SETTINGS = {"help_option_names": ["-h", "--help"], "ignore_unknown_options": True}


Faults = list[str] | None
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file, or the name of a shipped job.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the job file.")]
Kill = Annotated[
    Faults,
    typer.Option(help="Kill worker:RANK@STEP, node:SLOT@STEP, agent:SLOT@STEP, supervisor:.. or store@STEP."),
]
Freeze = Annotated[Faults, typer.Option(help="Freeze node:SLOT@STEP until it has been replaced.")]
Corrupt = Annotated[Faults, typer.Option(help="Corrupt chunk:SLOT@STEP of the newest snapshot, then kill a worker.")]
Stop = Annotated[Faults, typer.Option(help="Stop disk@STEP: prevent checkpoint writes for two steps.")]
Spares = Annotated[
    int | None,
    typer.Option(min=0, max=64, help="Number of spare nodes that replace lost ones. [default: as many as are lost]"),
]
Random = Annotated[int, typer.Option(min=0, help="Number of faults to draw at random.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed; the same seed draws the same faults.")]
Timeout = Annotated[float, typer.Option(min=1, help="Maximum duration of each of the two runs, in seconds.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Repeat the uninterrupted run even if its result exists.")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the result to this file as an HTML page.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options."""

    job: Path
    overrides: Faults
    kill: Faults
    freeze: Faults
    corrupt: Faults
    stop: Faults
    spares: int | None
    random: int
    seed: int
    timeout: float
    fresh: bool
    html: Path | None
    as_json: bool

    @property
    def changes(self) -> list[str]:
        """Return the job overrides other than that of the output folder."""
        return [text for text in self.overrides or [] if not text.removeprefix("--").startswith("output=")]


def main(arguments: Sequence[str]) -> None:
    """Run the command. Raises DrillError on bad input, RanksFailed if the results differ."""
    app(args=list(arguments), prog_name="keepwarm drill", standalone_mode=True)


@app.command(context_settings=_SETTINGS)
def drill(
    job: JobFile,
    overrides: Overrides = None,
    kill: Kill = None,
    freeze: Freeze = None,
    corrupt: Corrupt = None,
    stop: Stop = None,
    spares: Spares = None,
    random: Random = 0,
    seed: Seed = 0,
    timeout: Timeout = 1800.0,
    fresh: Fresh = False,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Inject faults into a run and compare the result with that of an uninterrupted run of the same job.

    keepwarm drill ci/drill --kill worker:1@5

    keepwarm drill ci/drill --kill node:2@8 --corrupt chunk:1@16 --html drill.html

    keepwarm drill ci/drill --random 3 --seed 7 --json

    A fault is injected after its step completes; `@20+1.5` is 1.5 seconds later. Inject several at once with
    `workers:0,3@20`. Both runs are kept in the job's output folder. Exit code 0 means that losses and final state are
    bitwise equal and no process was left behind. See docs/drills.md.
    """
    run(Options(**locals()))


def run(options: Options) -> None:
    """Carry out the drill and print its result.

    Raises:
        SpecError, DataError, PreflightError, DrillError: nothing was started.
        RanksFailed: the run with faults differs from the uninterrupted run, or a signal has ended the drill.
    """
    job = load_job(options.job, options.overrides or [])
    check_job(job)
    asked: list[int] = []
    plan = replace(_plan(options, job), stopped=lambda: bool(asked))
    # Noted and no more: an exception could strike between the start of a run and the code that ends it.
    with signals.handled((signal.SIGINT, signal.SIGTERM), lambda number, frame: asked.append(number)):
        result = campaign.run(
            plan, fresh=options.fresh, say=lambda text: print(f"drill: {text}", file=sys.stderr, flush=True)
        )
    if options.html is not None:
        write_html(result, job.name, options.html)
    if options.as_json:
        print(json.dumps(result.data(), allow_nan=False))
    else:
        print_result(result, job.name)
    if not result.bitwise_equal or result.residue:
        raise RanksFailed("the drill found a difference or processes left behind, see above", ExitCode.UNRECOVERABLE)


def _plan(options: Options, job: JobSpec) -> campaign.Drill:
    """Plan the drill.

    Raises DrillError if there is no fault, a fault does not apply to the job, or the output folder holds a run.
    """
    stage = _stage(job, DRAWN_SPARES if options.spares is None else options.spares)
    wanted = _faults(options, job, stage)
    lost = sum(len(fault.numbers) for fault in wanted if fault.target in ("node", "supervisor"))
    spares = lost if options.spares is None else options.spares
    faults.check(wanted, replace(stage, spares=spares))
    folder = Path(job.output)
    if RunFolder(folder).exists:
        raise DrillError(f"{folder}: this is the folder of a run; give the drill one of its own with output=PATH")
    return campaign.Drill(
        job=job,
        source=options.job,
        overrides=options.changes,
        faults=wanted,
        launch=["--nodes", str(stage.nodes), "--spares", str(spares)] if stage.supervised else (),
        timeout=options.timeout,
    )


def _faults(options: Options, job: JobSpec, stage: Stage) -> list[Fault]:
    """Return the faults given on the command line and those drawn at random."""
    given: list[tuple[Action, Faults]] = [
        ("kill", options.kill),
        ("freeze", options.freeze),
        ("corrupt", options.corrupt),
        ("stop", options.stop),
    ]
    wanted = [faults.parse(action, text) for action, texts in given for text in texts or []]
    wanted += faults.draw(options.random, options.seed, stage, _parity(job)) if options.random else []
    if not wanted:
        raise DrillError("a drill needs a fault: --kill worker:1@20, --corrupt chunk:1@20, or --random 3")
    return wanted


def _stage(job: JobSpec, spares: int) -> Stage:
    if job.snapshot == "off":
        raise DrillError(
            f"{job.name}: nothing is kept in memory, as the job has snapshot: off; set snapshot={{every: 1}}"
        )
    layout = job.layout
    return Stage(
        steps=plan_stages(job)[-1].end_step,
        ranks=layout.world_size,
        nodes=layout.nodes,
        spares=spares,
        durable=job.snapshot.durable is not None,
        supervised=layout.nodes > 1,
    )


def _parity(job: JobSpec) -> int:
    from keepwarm.ft.groups import groups_of

    assert job.snapshot != "off"
    return min(group.m for group in groups_of(job.layout.nodes, job.snapshot))
