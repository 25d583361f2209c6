"""`keepwarm lineage`: show the ancestors and descendants of a model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from keepwarm.trainer import tool
from keepwarm.trainer.continual import lineage
from keepwarm.trainer.job.url import local_path

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, checkpoint or export.")],
    below: Annotated[
        Path | None, typer.Option("--in", help="Folder to search for descendants; default: the parent of RUN.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a run, checkpoint or export was derived from, and what was derived from it.

    keepwarm lineage runs/demo

    keepwarm lineage exports/demo --in .
    """
    path = local_path(path)
    members = lineage.ancestry(path)
    start = next(iter(members))
    members = lineage.family(path, start.parent if below is None else below)
    if as_json:
        typer.echo(json.dumps({"path": str(start), "artefacts": lineage.as_data(members)}))
    else:
        for line in lineage.tree(members, start):
            typer.echo(line)


if __name__ == "__main__":
    tool.run(app)
