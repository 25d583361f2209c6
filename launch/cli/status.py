"""`keepwarm status RUN`: show a run's progress, saved state, nodes and time breakdown."""

import contextlib
import json
import shlex
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from keepwarm.ft.format import publication
from keepwarm.launch.batch.jobs import jobs_of
from keepwarm.launch.batch.runs import last_end, runs_in, table
from keepwarm.launch.batch.sweep_folder import values_of
from keepwarm.launch.batch_system import BatchJob
from keepwarm.launch.cli.snapshots import ask
from keepwarm.launch.errors import ClusterError, SnapshotsError, StatusError
from keepwarm.launch.node.record import NodeRecord, read_all
from keepwarm.launch.run.progress import progress
from keepwarm.text import counted
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.goodput import Goodput, of_run


def show(folder: Path, *, as_json: bool) -> None:
    """Print the state of the run in a folder, or of the runs of a sweep.

    Raises:
        StatusError: there is no run in the folder.
    """
    if (values := values_of(folder)) is not None:
        _show_sweep(folder, values, as_json=as_json)
        return
    found = status(folder)
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        _print(found, of_run(folder))


def _show_sweep(folder: Path, values: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    runs = {name: folder / name for name in values if RunFolder(folder / name).exists}
    if as_json:
        print(json.dumps([{"values": values[name]} | status(run) for name, run in runs.items()], allow_nan=False))
        return
    print("\n".join(table(runs_in(folder))))
    for name, each in values.items():
        place = shlex.quote(str(folder / name))
        print(f"{place}: {', '.join(f'{key}={json.dumps(value)}' for key, value in each.items())}")


def status(folder: Path) -> dict[str, Any]:
    """Return name, completed and total steps, speed, saved state, job, restarts, nodes and goodput as plain values.

    Raises:
        StatusError: as `show`.
    """
    if not RunFolder(folder).exists:
        raise StatusError(f"{folder}: there is no run here ({RUN_FILE} is missing)")
    log = events.read(folder)
    job, far = load_run(RunFolder(folder).run_file), progress(folder)
    saved = publication.checkpoints(RunFolder(folder).checkpoints)
    memory = committed(folder)
    steps = [int(path.name.removeprefix("iter_")) for path in saved[-1:]] + ([memory[1]] if memory else [])
    batch = last_job(folder)
    end, why = last_end(log.events)
    return {
        "run": job.name,
        "step": far.step,
        "last_step": far.last_step,
        "loss": far.loss,
        "tokens_per_s": far.tokens_per_s,
        "eta_s": far.eta_s,
        "committed": memory,
        "checkpoint": saved[-1].name if saved else None,
        "unsaved_steps": max(0, far.step - max(steps, default=0)),
        "job": None if batch is None else {"id": batch.id, "state": batch.state, "reason": batch.reason},
        "end": end,
        "why": why,
        "restarts": restarts(log.events),
        "unknown_events": log.unknown,
        "nodes": [
            msgspec.to_builtins(record, str_keys=True) | {"state": state}
            for record, state in node_states(read_all(folder), log.events, ended=batch is not None and not batch.active)
        ],
        "goodput": of_run(folder).data(),
    }


def last_job(folder: Path) -> BatchJob | None:
    """Return the active job of a run, or the last one that its batch system knows; None if it cannot be asked."""
    with contextlib.suppress(ClusterError):
        known = jobs_of(folder)
        return next((job for job in known if job.active), known[-1] if known else None)
    return None


def node_states(
    records: Sequence[NodeRecord], log: Sequence[events.Event], *, ended: bool
) -> list[tuple[NodeRecord, str]]:
    """Return the records of nodes with their states. A node that died could not record its own death: it is `lost` if
    the others have found so, or have its slot. No node of a job that has `ended`, or of an earlier allocation, runs.
    Pure.
    """
    lost: set[str] = set()
    left: set[str] = set()
    newest: dict[int, int] = {}
    for event in log:
        if isinstance(event, events.Failure) and event.kind == "lost":
            lost.add(event.node)
        elif isinstance(event, events.SupervisorStarted):
            lost.discard(event.node)
        elif isinstance(event, events.BatchStarted):
            left = {record.node for record in records} - {*event.nodes}
    for record in records:
        if record.slot is not None:
            newest[record.slot] = max(newest.get(record.slot, 0), record.restart)
    found: list[tuple[NodeRecord, str]] = []
    for record in records:
        overtaken = record.slot is not None and record.restart < newest[record.slot]
        state: str = record.state
        if state not in ("ended", "fenced", "spare") and (record.node in lost or overtaken):
            state = "lost"
        elif ended or record.node in left:
            state = "ended"
        found.append((record, state))
    return found


def committed(folder: Path) -> tuple[int, int] | None:
    """Return (epoch, step) of the newest snapshot committed according to agents here; None without agents."""
    with contextlib.suppress(SnapshotsError):
        return max((one.committed for one in ask(folder)[0] if one.committed is not None), default=None)
    return None


def restarts(log: Sequence[events.Event]) -> list[dict[str, Any]]:
    """Return time, recovery level and cause of each restart that supervisors or the batch job recorded. Pure."""
    return [
        {"time": event.time, "level": event.level if isinstance(event, events.Recovery) else None, "why": event.why}
        for event in log
        if isinstance(event, events.Recovery | events.Requeue)
        or (isinstance(event, events.BatchEnded) and event.verdict == "again")
    ]


def _print(found: dict[str, Any], account: Goodput) -> None:
    console = Console(highlight=False, markup=False)
    console.print(f"{found['run']}: {found['step']} of {found['last_step']} steps", soft_wrap=True)
    if found["loss"] is not None:
        left = timedelta(seconds=round(found["eta_s"]))
        console.print(f"loss {found['loss']:.4f}, {found['tokens_per_s']:.0f} tokens/s, {left} left", soft_wrap=True)
    memory = "none known here" if found["committed"] is None else f"step {found['committed'][1]}"
    console.print(f"saved: in memory {memory}, on disk {found['checkpoint'] or 'nothing'}", soft_wrap=True)
    if found["unsaved_steps"]:
        console.print(f"steps after that, which a restart would repeat: {found['unsaved_steps']}", soft_wrap=True)
    if found["job"] is not None:
        reason = f" ({found['job']['reason']})" if found["job"]["reason"] else ""
        console.print(f"job {found['job']['id']}: {found['job']['state']}{reason}", soft_wrap=True)
    if found["why"] is not None:
        console.print(f"last job: {found['end'] or 'requeued'}: {found['why']}", soft_wrap=True)
    for one in found["restarts"]:
        when = datetime.fromtimestamp(one["time"]).strftime("%Y-%m-%d %H:%M:%S")
        level = "" if one["level"] is None else f" (level {one['level']})"
        console.print(f"restarted {when}{level}: {one['why']}", soft_wrap=True)
    if found["unknown_events"]:
        console.print(f"not known to this version: {counted(found['unknown_events'], 'event')}", soft_wrap=True)
    if found["nodes"]:
        table = Table(title="nodes")
        for column in ("node", "host", "slot", "state", "ranks", "restart"):
            table.add_column(column)
        for node in found["nodes"]:
            slot = "-" if node["slot"] is None else str(node["slot"])
            ranks = ",".join(sorted(node["workers"], key=int)) or "-"
            table.add_row(node["node"], node["host"], slot, node["state"], ranks, str(node["restart"]))
        console.print(table)
    table = Table(title=f"goodput {account.share:.1%}")
    for column in ("seconds of", "", "share"):
        table.add_column(column, justify="left" if column == "seconds of" else "right")
    for kind, seconds in account.seconds.items():
        table.add_row(kind, f"{seconds:.1f}", f"{seconds / account.wall:.1%}" if account.wall else "-")
    table.add_section()
    table.add_row("all", f"{account.wall:.1f}", "")
    console.print(table)
    console.print(
        f"{counted(account.steps, 'step')} kept, {account.steps_lost} lost, {counted(account.restarts, 'restart')}",
        soft_wrap=True,
    )
    if account.stopped:
        console.print(f"not running for {account.stopped:.1f} s between an end and a continuation", soft_wrap=True)
