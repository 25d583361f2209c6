"""`keepwarm status RUN`: how far a run is, which nodes it is on, and where its time went."""

import json
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from launch.errors import StatusError
from launch.node_record import read_all
from trainer.goodput import Goodput, of_run
from trainer.spec_file import RUN_FILE, load_run
from trainer.stages import plan_stages


def show(folder: Path, *, as_json: bool) -> None:
    """Print the state of the run in a folder.

    Raises:
        StatusError: there is no run in the folder.
    """
    found = status(folder)
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        _print(found, of_run(folder))


def status(folder: Path) -> dict[str, Any]:
    """Plain values: the run's name, completed steps of how many, nodes, goodput.

    Raises:
        StatusError: as `show`.
    """
    if not (folder / RUN_FILE).is_file():
        raise StatusError(f"{folder}: there is no run here ({RUN_FILE} is missing)")
    job = load_run(folder / RUN_FILE)
    return {
        "run": job.name,
        "step": completed(folder),
        "last_step": plan_stages(job)[-1].end_step,
        "nodes": [msgspec.to_builtins(record, str_keys=True) for record in read_all(folder)],
        "goodput": of_run(folder).data(),
    }


def completed(folder: Path) -> int:
    """Steps that the run has completed and not lost again, as metrics.jsonl says."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open(encoding="utf-8") as lines:
        return max((json.loads(line)["step"] for line in lines if line.endswith("}\n")), default=0)


def _print(found: dict[str, Any], account: Goodput) -> None:
    console = Console(highlight=False, markup=False)
    console.print(f"{found['run']}: {found['step']} of {found['last_step']} steps", soft_wrap=True)
    if found["nodes"]:
        table = Table(title="nodes")
        for column in ("node", "host", "slot", "state", "ranks", "generation"):
            table.add_column(column)
        for node in found["nodes"]:
            slot = "-" if node["slot"] is None else str(node["slot"])
            ranks = ",".join(sorted(node["workers"], key=int)) or "-"
            table.add_row(node["node"], node["host"], slot, node["state"], ranks, str(node["generation"]))
        console.print(table)
    table = Table(title=f"goodput {account.share:.1%}")
    for column in ("seconds of", "", "share"):
        table.add_column(column, justify="left" if column == "seconds of" else "right")
    for kind, seconds in account.seconds.items():
        table.add_row(kind, f"{seconds:.1f}", f"{seconds / account.wall:.1%}" if account.wall else "-")
    table.add_section()
    table.add_row("all", f"{account.wall:.1f}", "")
    console.print(table)
    console.print(f"{account.steps} steps kept, {account.steps_lost} lost, {account.restarts} restarts", soft_wrap=True)
    if account.stopped:
        console.print(f"not running for {account.stopped:.1f} s between an end and a continuation", soft_wrap=True)
