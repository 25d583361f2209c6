"""`keepwarm train --nodes N --spares M`: run a job on emulated nodes of this machine, each with a supervisor."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from types import FrameType

from rich.console import Console

from keepwarm import signals
from keepwarm.exit_code import ExitCode
from keepwarm.ft.transport.auth import SECRET
from keepwarm.launch.errors import PreflightError, RanksFailed
from keepwarm.launch.forkserver import ForkServer, Worker
from keepwarm.launch.node import record
from keepwarm.launch.run.node_check import visible_gpus
from keepwarm.launch.run.preflight import check_job, check_memory
from keepwarm.launch.run.prepare import Mode, prepared
from keepwarm.text import counted
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.monitor import events

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SIGNAL_POLL_INTERVAL_S = 0.2
"""Seconds between checks for signals to forward; the end of the nodes is noticed at once."""


def run_on_nodes(job: JobSpec, mode: Mode, console: Console, *, nodes: int, spares: int) -> None:
    """Make the run folder and run the job on as many emulated nodes as its layout has, plus spares.

    Raises:
        PreflightError: the layout has another number of nodes.
        RanksFailed: the run ended early; with its exit code.
    """
    check_nodes(job, nodes, spares)
    check_gpus(job, nodes + spares, os.environ)
    check_job(job)
    check_memory(job, emulated=True)
    with prepared(job, mode) as spec:
        folder = spec.parent
        # Left by an earlier start. The lock on the run folder guarantees that none of its supervisors lives.
        shutil.rmtree(RunFolder(folder).nodes, ignore_errors=True)
        record.make_folder(folder)
        seen, secret = events.size(folder), folder / SECRET
        had_secret = secret.exists()
        console.print(
            f"keepwarm: {job.name}: starting {counted(nodes, 'node')} of {counted(job.layout.ranks_per_node, 'rank')} "
            f"and {counted(spares, 'spare')}; outputs in {folder}"
        )
        resume = ("--resume",) if mode == "resume" else ()
        arguments = (str(folder), "--slots", str(nodes), "--spares", str(spares), "--spec", spec.name, *resume)
        code = _run(Worker(module="keepwarm.launch.local.emulated_nodes", arguments=arguments, environment={}))
        if code == ExitCode.BAD_INPUT and mode == "resume" and not had_secret:
            secret.unlink(missing_ok=True)  # a refusal leaves the run as it was
        if code:
            ended = events.read(folder, start=seen).of(events.SupervisorEnded)
            last = [event.why for event in ended if event.code == code]
            lost = "every node was lost; --resume continues from the newest checkpoint"
            why = last[-1] if last else "interrupted" if code == ExitCode.INTERRUPTED else lost
            raise RanksFailed(why, code if code in ExitCode.of_run() else ExitCode.UNRECOVERABLE)


def check_nodes(job: JobSpec, nodes: int, spares: int) -> None:
    """Raise `PreflightError` unless the layout fills exactly these nodes."""
    layout = job.layout
    if nodes != layout.nodes:
        raise PreflightError(
            f"--nodes {nodes}: the layout has {counted(layout.world_size, 'rank')} (parallel.data x pipeline x tensor) "
            f"on {counted(layout.nodes, 'node')} of cluster.ranks_per_node = {layout.ranks_per_node}; "
            f"give --nodes {layout.nodes}, or change parallel.* or cluster.ranks_per_node"
        )
    if spares and job.snapshot == "off" and job.checkpoint.every is None:
        raise PreflightError(
            f"--spares {spares}: there is nothing that a spare could continue from; set snapshot or checkpoint.every"
        )


def check_gpus(job: JobSpec, nodes: int, environment: Mapping[str, str]) -> None:
    """Raise `PreflightError` if this machine has GPUs, but too few to give every emulated node its own."""
    gpus, ranks = len(visible_gpus(environment)), job.layout.ranks_per_node
    if job.cluster.device != "cpu" and 0 < gpus < nodes * ranks:
        raise PreflightError(
            f"{nodes} emulated nodes, spares included, of {ranks} {'rank' if ranks == 1 else 'ranks'} need "
            f"{nodes * ranks} GPUs, and {gpus} are visible here: start fewer, or set cluster.device = cpu"
        )


def _run(worker: Worker) -> int:
    """Run one process, forwarding signals to it, and return its exit code: 130 if it ended before it handled one."""
    with _recorded_signals() as pending, contextlib.closing(ForkServer()) as server:
        pid, forwarded = server.start(worker), False
        while pid not in server.ended:
            server.poll(SIGNAL_POLL_INTERVAL_S)
            while pending:
                server.send([pid], pending.pop(0))
                forwarded = True
        code = server.ended[pid]
        return ExitCode.INTERRUPTED if forwarded and code < 0 else code


@contextlib.contextmanager
def _recorded_signals() -> Iterator[list[signal.Signals]]:
    """Record the signals that arrive inside the `with` block, in order, in place of acting on them."""
    pending: list[signal.Signals] = []

    def record_signal(number: int, frame: FrameType | None) -> None:
        pending.append(signal.Signals(number))

    with signals.handled(_FORWARDED, record_signal):
        yield pending
