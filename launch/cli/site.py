"""`keepwarm site`: show the site file that applies, or propose one. Importing this module loads neither."""

from pathlib import Path
from typing import Annotated

import typer

site = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Show or propose the site file: a cluster's defaults for every job.

It has values of a job's section `cluster.slurm` that are the same for all jobs of a site, such as:

    cluster:
      slurm: {account: lab, partition: gpu, modules: [cuda/12]}

Yours is `~/.config/keepwarm/site.yaml` (`XDG_CONFIG_HOME` is respected) and stands over the system's,
`/etc/keepwarm/site.yaml`. A job file and its overrides stand over both. `KEEPWARM_SITE` names another file to use
instead; empty, none is used. `keepwarm plan JOB` shows what a job takes from it.
""",
)


@site.command()
def show(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the defaults that apply here, and the file and line of each.

    keepwarm site show

    keepwarm site show --json
    """
    import json

    from keepwarm.launch.plan.text import table
    from keepwarm.trainer.job.site.defaults import leaves
    from keepwarm.trainer.job.site.site_file import SYSTEM_FILE, read_site, site_files, user_file

    merged = read_site()
    files = list(map(str, site_files()))
    found = [
        {"key": ".".join(("cluster", *keys)), "value": value, "source": merged.place(("cluster", *keys))}
        for keys, value in leaves(merged.values["cluster"])
    ]
    if as_json:
        typer.echo(json.dumps({"files": files, "defaults": found}))
    elif files:
        rows = [[each["key"], json.dumps(each["value"]), each["source"]] for each in found]
        typer.echo("\n".join([f"site files, the first over the second: {', '.join(files)}", *table(_HEADER, rows)]))
    else:
        places = " nor ".join(str(place) for place in (user_file(), SYSTEM_FILE) if place is not None)
        typer.echo(f"no site file is used: there is neither {places}, or KEEPWARM_SITE is empty")
        typer.echo("keepwarm site init proposes one for this cluster")


_HEADER = ("key", "value", "place")


@site.command()
def init(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file, not to stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Propose a site file for this cluster, from what `sinfo` and `scontrol` say about it.

    It lists the partitions, chooses the one with the most GPUs, and has every other key as a comment with what the
    cluster says about it. Read it, then change it: account, environment and network are known to you alone.

        keepwarm site init

        keepwarm site init -o ~/.config/keepwarm/site.yaml
    """
    import os

    from keepwarm.launch.slurm.site_proposal import ask_cluster, proposal

    text = proposal(*ask_cluster(), os.environ)
    if output is None:
        typer.echo(text, nl=False)
    else:
        _write(output, text, force=force)


def _write(path: Path, text: str, *, force: bool) -> None:
    from keepwarm.files import READABLE, atomic_write
    from keepwarm.trainer.errors import OutputError

    if path.exists() and not force:
        raise OutputError(f"{path}: the file exists; --force replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text.encode(), mode=READABLE)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    typer.echo(f"keepwarm: {path}: written; read it and change what fits", err=True)
