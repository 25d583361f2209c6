"""`keepwarm average`: average the weights of several checkpoints into one."""

import json
from pathlib import Path
from typing import Annotated

import typer

from keepwarm.trainer import tool
from keepwarm.trainer.continual.average import average

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Checkpoints, or run folders for their newest one.")
    ],
    output: Annotated[Path, typer.Option(help="Checkpoint folder to create; must not exist.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each run, in order; default: all equal.")
    ] = None,
    moving: Annotated[
        bool, typer.Option("--moving", help="Average the runs' moving averages instead of their last weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Average the weights of several branches of one run. The runs are not changed.

    keepwarm average runs/base-anneal-6000 runs/second runs/third --output runs/soup

    keepwarm average runs/base --moving --output runs/base-average
    """
    done = average(runs, output, weights=weight, moving=moving)
    if as_json:
        typer.echo(json.dumps(done))
        return
    typer.echo(f"{done['destination']}: {done['tensors']} tensors, {done['bytes'] / 1e6:.1f} MB, the mean of")
    for source, share in zip(done["sources"], done["weights"], strict=True):
        typer.echo(f"  {share:.1%} {source}")
    if not done["ledger"]:
        typer.echo("without a ledger: not all of them tell what they saw, or they number samples differently")


if __name__ == "__main__":
    tool.run(app)
