"""`keepwarm drill`: what would happen if. Scripted faults, compared with a run that nothing happens to."""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from keepwarm.exit_code import ExitCode
from launch.drill import campaign, faults
from launch.drill.faults import Action, Stage
from launch.drill.report import print_result, write_html
from launch.errors import DrillError, RanksFailed
from launch.preflight import check_installation, check_job
from trainer.run_folder import RunFolder
from trainer.spec import JobSpec
from trainer.spec_file import load_job
from trainer.stages import plan_stages

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
DRAWN_SPARES = 3
"""Nodes that drawn faults may take when nobody says how many spares there are."""
_SETTINGS = {"help_option_names": ["-h", "--help"], "ignore_unknown_options": True}


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises DrillError on bad input, RanksFailed when the run was not the same."""
    app(args=list(arguments), prog_name="keepwarm drill", standalone_mode=True)


@app.command(context_settings=_SETTINGS)
def drill(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Job file, or the name of a shipped job.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    kill: Annotated[
        list[str] | None, typer.Option(help="worker:RANK@STEP, node:SLOT@STEP, agent:.., supervisor:.., store@STEP.")
    ] = None,
    freeze: Annotated[list[str] | None, typer.Option(help="node:SLOT@STEP; it wakes up once it was replaced.")] = None,
    corrupt: Annotated[
        list[str] | None, typer.Option(help="chunk:SLOT@STEP of the newest snapshot, and kill a worker right after.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="disk@STEP: no checkpoint can be written for two steps.")
    ] = None,
    spares: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="Nodes that can take the slot of a lost one. [default: as many as are lost]"),
    ] = None,
    random: Annotated[int, typer.Option(min=0, help="Draw that many faults.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same faults.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that each of the two runs may take.")] = 1800.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat the uninterrupted run even if it is there.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as one page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a job while things fail, and compare with a run of the same job that nothing happens to.

    What does a dead worker cost, and is the result the same?

        keepwarm drill ci/drill --kill worker:1@5

    A node that dies with its memory, a chunk that rots and is found when it is needed:

        keepwarm drill ci/drill --kill node:2@8 --corrupt chunk:1@16 --html drill.html

    Faults that were drawn, the same for the same seed:

        keepwarm drill ci/drill --random 3 --seed 7 --json

    The step is the one after whose completion the fault happens; `@20+1.5` is one and a half seconds later. Several
    at once are written `workers:0,3@20`. Both runs are kept in the job's output folder. Exit code 0 means that
    losses and final state are bitwise equal and no process was left behind. docs/drills.md says more.
    """
    check_installation()
    spec = load_job(job, overrides or [])
    check_job(spec)
    stage = _stage(spec, DRAWN_SPARES if spares is None else spares)
    given: list[tuple[Action, list[str] | None]] = [
        ("kill", kill),
        ("freeze", freeze),
        ("corrupt", corrupt),
        ("stop", stop),
    ]
    wanted = [faults.parse(action, text) for action, texts in given for text in texts or []]
    wanted += faults.draw(random, seed, stage, _parity(spec)) if random else []
    if not wanted:
        raise DrillError("a drill needs a fault: --kill worker:1@20, --corrupt chunk:1@20, or --random 3")
    lost = sum(len(fault.numbers) for fault in wanted if fault.target in ("node", "supervisor"))
    faults.check(wanted, replace(stage, spares=lost if spares is None else spares))
    folder = Path(spec.output)
    if RunFolder(folder).exists:
        raise DrillError(f"{folder}: this is the folder of a run; give the drill one of its own with output=PATH")
    kept = [text for text in overrides or [] if not text.removeprefix("--").startswith("output=")]
    nodes = ["--nodes", str(stage.nodes), "--spares", str(lost if spares is None else spares)]
    plan = campaign.Drill(
        job=spec,
        source=job,
        overrides=kept,
        faults=wanted,
        launch=nodes if stage.supervised else (),
        timeout=timeout,
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the run as well
    result = campaign.run(plan, fresh=fresh, say=lambda text: print(f"drill: {text}", file=sys.stderr, flush=True))
    if html is not None:
        write_html(result, spec.name, html)
    if as_json:
        print(json.dumps(result.data(), allow_nan=False))
    else:
        print_result(result, spec.name)
    if not result.bitwise_equal or result.residue:
        raise RanksFailed("the drill found a difference or processes left behind, see above", ExitCode.UNRECOVERABLE)


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
    from ft.placement import groups_of

    assert job.snapshot != "off"
    return min(group.m for group in groups_of(job.layout.nodes, job.snapshot))
