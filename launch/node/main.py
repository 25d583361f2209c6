"""Supervise one node of a run. Start it once on every node, spares included:

    python -P -m keepwarm.launch.node RUN_FOLDER --slots N [--node NAME] [--host ADDRESS] [--ranks-per-node R]
                             [--slot K | --spare] [--resume] [--spec NAME]

It takes a slot or waits as a spare, keeps the slot's snapshot agent running, and starts and restarts workers until the
run has ended. Its exit code is that of the run: 0 done, 2 bad input, 3 training stopped itself, 4 unrecoverable fault,
6 state not saved, 130 interrupted. `RUN_FOLDER` holds the `run.json` of the job and is shared by all nodes.
"""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from keepwarm import signals
from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.node.options import LOOPBACK, VACANCY_TIMEOUT_S, Options
from keepwarm.launch.run.preflight import check_memory
from keepwarm.side_writer import protect_streams
from keepwarm.text import counted
from keepwarm.trainer.errors import TrainerError
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE
from keepwarm.trainer.job.spec import JobSpec


def set_environment(job: JobSpec) -> None:
    """Set threads, and silence C++ stacks when a store dies. Call before importing torch, which reads these once."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(job.numerics.threads_per_rank)


def leave_on(*numbers: signal.Signals) -> None:
    """Let signals end this process with 130, while it has nothing to save and no process to end."""
    signals.handle(numbers, lambda number, frame: os._exit(ExitCode.INTERRUPTED))


def main(arguments: Sequence[str]) -> int:
    protect_streams()
    leave_on(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # until it is a supervisor
    parser = argparse.ArgumentParser(
        prog="python -P -m keepwarm.launch.node", description="Supervise one node of a run."
    )
    parser.add_argument("folder", type=Path, help="run folder with run.json, on storage that all nodes share")
    parser.add_argument("--slots", type=int, required=True, metavar="N", help="nodes that the layout has")
    parser.add_argument("--node", default=f"{socket.gethostname()}-{os.getpid()}", help="name, unique in the run")
    parser.add_argument("--host", default=LOOPBACK, metavar="ADDRESS", help="where the other nodes reach this one")
    parser.add_argument("--domain", default="", metavar="NAME", help="failure domain, as a rack or a switch")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="default: from the layout")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--slot", type=int, metavar="K", help="take this slot when it is vacant")
    place.add_argument("--spare", action="store_true", help="take no slot until a node is lost")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument("--spec", default=RUN_FILE, metavar="NAME", help="file in the run folder that names the job")
    parser.add_argument(
        "--vacancy-timeout",
        type=float,
        default=VACANCY_TIMEOUT_S,
        metavar="SECONDS",
        help="how long a slot may stay vacant",
    )
    given = parser.parse_args(arguments)
    try:
        job = load_run(given.folder.absolute() / given.spec)
        check_memory(job, emulated=False)
    except (TrainerError, LaunchError) as error:
        print(f"keepwarm: {error}", file=sys.stderr)
        return error.exit_code
    layout = job.layout
    if given.slots != layout.nodes or given.ranks_per_node not in (None, layout.ranks_per_node):
        print(
            f"keepwarm: {given.folder / given.spec}: the layout has {counted(layout.nodes, 'node')} of "
            f"{counted(layout.ranks_per_node, 'rank')} (parallel.*, cluster.ranks_per_node), but the command line asks "
            f"for {counted(given.slots, 'slot')} of {given.ranks_per_node or layout.ranks_per_node}",
            file=sys.stderr,
        )
        return ExitCode.BAD_INPUT
    options = Options(
        folder=given.folder.absolute(),
        slots=given.slots,
        node=given.node,
        host=given.host,
        domain=given.domain,
        ranks_per_node=layout.ranks_per_node,
        requested_slot="spare" if given.spare else "any" if given.slot is None else given.slot,
        resume=given.resume,
        vacancy_timeout=given.vacancy_timeout,
        spec=given.spec,
    )
    set_environment(job)
    # Imported last: the arguments are valid and the threads are set.
    from keepwarm.launch.forkserver import preload
    from keepwarm.launch.node.supervisor import supervise

    preload()
    return supervise(options, job)
