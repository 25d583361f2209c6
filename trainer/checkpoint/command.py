"""`keepwarm checkpoint`: inspect and manage native checkpoints."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.exit_code import ExitCode
from keepwarm.ft.format import publication
from keepwarm.trainer import tool
from keepwarm.trainer.checkpoint import copy as checkpoint_copy
from keepwarm.trainer.checkpoint import report
from keepwarm.trainer.errors import CheckpointError, OutputError
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.url import local_path

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Verify, show, compare and prune checkpoints. PATH is a checkpoint, or a run folder for its newest one.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Where = Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint, folder of checkpoints, or run folder.")]


@app.command()
def verify(path: Where, as_json: AsJson = False) -> None:
    """Verify every byte against the checksums of the manifest."""
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown and sys.stderr.isatty():
            shown = percent
            print(f"\r{percent:3d} % of {total / 1e9:.1f} GB", end="\n" if done == total else "", file=sys.stderr)

    found = report.verify(path, progress)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(
            f"{found['path']}: step {found['step']}, {found['pieces']} pieces, {_size(found['bytes'])}, all good"
        )


@app.command()
def show(path: Where, as_json: AsJson = False) -> None:
    """Show the contents of a checkpoint: step, layout, tensors, ledger. Does not read the data."""
    found = report.show(path)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{found['path']}: run {found['run']}, step {found['step']}, epoch {found['epoch']}")
    typer.echo(f"layout {found['layout']}, {len(found['parts'])} parts")
    for name, group in found["groups"].items():
        typer.echo(f"  {name:<12} {group['tensors']:>6} tensors {_size(group['bytes']):>10}")
    if found["parent"]:
        typer.echo(f"parent: {found['parent'].get('path')}")
    if found["ledger"]:
        given = ", ".join(f"{name} {count:,}" for name, count in found["ledger"]["given"].items())
        typer.echo(f"ledger: {found['ledger']['position']:,} samples, of {given or 'nothing yet'}")
    for tensor in found["tensors"]:
        typer.echo(f"{tensor['dtype']:>5} {'x'.join(map(str, tensor['shape'])) or 'scalar':<16} {tensor['name']}")


@app.command()
def diff(
    one: Where,
    two: Annotated[Path, typer.Argument(metavar="OTHER", help="Checkpoint to compare with, of any layout.")],
    as_json: AsJson = False,
) -> None:
    """Compare names, shapes and values, tensor by tensor. Exit with 1 if anything differs."""
    found = report.diff(one, two)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print_diff(found)
    raise typer.Exit(ExitCode.DONE if found["equal"] else ExitCode.FAULT)


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint or run folder, or the URL of either.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder or URL to copy it into.")],
    as_json: AsJson = False,
) -> None:
    """Copy a checkpoint from or to any fsspec URL, such as s3://bucket/run; verified and all-or-nothing."""
    done = checkpoint_copy.copy(source, destination, lambda done, total: None)
    typer.echo(json.dumps(done) if as_json else f"{done['path']}: step {done['step']}, {_size(done['bytes'])}")


@app.command()
def prune(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of checkpoints, or run folder.")],
    keep: Annotated[int, typer.Option(min=1, help="Number of newest checkpoints to keep.")],
    every: Annotated[int | None, typer.Option(min=1, help="Also keep the checkpoints of every n-th step.")] = None,
    as_json: AsJson = False,
) -> None:
    """Delete old checkpoints, but never the one that `latest` names."""
    path = local_path(path)
    root = RunFolder(path).checkpoints if RunFolder(path).checkpoints.is_dir() else path
    if not publication.checkpoints(root):
        raise CheckpointError(f"{root}: holds no complete checkpoint")
    try:
        gone = publication.prune(root, keep, every)
    except OSError as error:
        raise OutputError(f"{error.filename or root}: {error.strerror}") from error
    kept = [found.name for found in publication.checkpoints(root)]
    if as_json:
        typer.echo(json.dumps({"path": str(root), "deleted": [found.name for found in gone], "kept": kept}))
    else:
        typer.echo(f"deleted: {', '.join(found.name for found in gone) or 'nothing'}; kept: {', '.join(kept)}")


def _print_diff(found: dict[str, Any]) -> None:
    for side, where in (("only_in_one", found["one"]), ("only_in_two", found["two"])):
        for name in found[side]:
            typer.echo(f"only in {where}: {name}")
    for tensor in found["tensors"]:
        if tensor["equal"]:
            continue
        shapes, dtypes = ({json.dumps(value): None for value in tensor[what]} for what in ("shapes", "dtypes"))
        far = "" if tensor["max_abs_diff"] is None else f", at most {tensor['max_abs_diff']:.3g} apart"
        typer.echo(f"{tensor['name']}: {' / '.join(dtypes)} {' / '.join(shapes)}{far}")
    same = sum(tensor["equal"] for tensor in found["tensors"])
    typer.echo(f"{same} of {len(found['tensors'])} shared tensors are equal to the bit")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


if __name__ == "__main__":
    tool.run(app)
