"""`keepwarm train --nodes N --spares M`: a job on emulated nodes of this machine, each with a supervisor."""

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

from launch import node_record
from launch.errors import PreflightError, RanksFailed
from launch.events import read
from launch.preflight import check_data_exists, check_engine
from launch.run_folder import Mode, prepared
from trainer.spec import JobSpec

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_on_nodes(job: JobSpec, mode: Mode, console: Console, *, nodes: int, spares: int) -> None:
    """Make the run folder and run the job on as many emulated nodes as its layout has, with spares beside them.

    Raises:
        PreflightError: the layout has another number of nodes.
        RanksFailed: the run ended early; with its exit code.
    """
    check_nodes(job, nodes, spares)
    check_engine(job)
    check_data_exists(job.data)
    with prepared(job, mode) as folder:
        # Of an earlier start of the run; the lock on the folder says that none of its supervisors lives.
        shutil.rmtree(folder / node_record.FOLDER, ignore_errors=True)
        node_record.make_folder(folder)
        seen = len(read(folder))
        console.print(
            f"keepwarm: {job.name}: starting {nodes} nodes of {job.layout.ranks_per_node} "
            f"{'rank' if job.layout.ranks_per_node == 1 else 'ranks'} and {spares} "
            f"{'spare' if spares == 1 else 'spares'}; outputs in {folder}"
        )
        command = [sys.executable, "-P", "-m", "launch.emulated", str(folder), "--slots", str(nodes)]
        command += ["--spares", str(spares), *(["--resume"] if mode == "resume" else [])]
        with (
            subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as process,
            _forwarded(process),
        ):
            code = process.wait()
        if code:
            last = [line for line in read(folder)[seen:] if line["event"] == "ended" and line.get("code") == code]
            why = last[-1]["why"] if last else "every node was lost; --resume continues from the newest checkpoint"
            raise RanksFailed(why, code if code in (2, 3, 4, 130) else 4)


def check_nodes(job: JobSpec, nodes: int, spares: int) -> None:
    """Raise `PreflightError` unless the layout fills just these nodes."""
    layout = job.layout
    if nodes != layout.nodes:
        raise PreflightError(
            f"--nodes {nodes}: the layout has {layout.world_size} ranks (parallel.data x pipeline x tensor) on "
            f"{layout.nodes} nodes of cluster.ranks_per_node = {layout.ranks_per_node}; give --nodes {layout.nodes}, "
            "or change parallel.* or cluster.ranks_per_node"
        )
    if spares and job.snapshot == "off" and job.checkpoint.every is None:
        raise PreflightError(
            f"--spares {spares}: there is nothing that a spare could continue from; set snapshot or checkpoint.every"
        )


@contextlib.contextmanager
def _forwarded(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
