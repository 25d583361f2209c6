"""Emulate several nodes on one machine: `python -P -m keepwarm.launch.local.emulated_nodes RUN_FOLDER --slots N
--spares M [--resume] [--spec NAME]`.

Each node has a supervisor in a session of its own, with an agent and workers; killing these loses the node and its
memory. This process imports once what all of them need, forks the supervisors, forwards signals to them and ends with
the exit code of the run.
"""

import argparse
import contextlib
import importlib
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from keepwarm import signals
from keepwarm.exit_code import ExitCode
from keepwarm.ft.discovery.config import NODE, runtime_folders
from keepwarm.ft.discovery.runtime_folder import clear, take_lock
from keepwarm.ft.errors import FtError
from keepwarm.ft.transport.auth import SECRET, load_secret, run_identity
from keepwarm.launch.node.main import leave_on, set_environment
from keepwarm.launch.node.options import VACANCY_TIMEOUT_S, Options
from keepwarm.launch.run.node_check import visible_gpus
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE
from keepwarm.trainer.job.spec import JobSpec

AGENTS_END_TIMEOUT_S = 30.0
"""How long the agents of a run may take to end after its supervisors."""
FAILED_END_TIMEOUT_S = 5.0
"""The same after a failure."""
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def main(arguments: Sequence[str]) -> int:
    leave_on(*_HANDLED)  # until there are supervisors to forward them to
    parser = argparse.ArgumentParser(
        prog="python -P -m keepwarm.launch.local.emulated_nodes", description="Emulate nodes on one machine."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--spares", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--spec", default=RUN_FILE)
    parser.add_argument("--vacancy-timeout", type=float, default=VACANCY_TIMEOUT_S)
    given = parser.parse_args(arguments)
    folder = given.folder.absolute()
    job = load_run(folder / given.spec)
    set_environment(job)
    from keepwarm.launch.forkserver import die_with, preload

    die_with(os.getppid())
    preload()
    importlib.import_module("keepwarm.launch.node.supervisor")
    nodes = [
        Options(
            folder=folder,
            slots=given.slots,
            node=f"node-{number}",
            ranks_per_node=job.layout.ranks_per_node,
            requested_slot=number if number < given.slots else "spare",
            resume=given.resume,
            vacancy_timeout=given.vacancy_timeout,
            spec=given.spec,
        )
        for number in range(given.slots + given.spares)
    ]
    code: int = ExitCode.FAULT
    try:
        code = Nodes(nodes, job).run()
    finally:
        # After a failure, agents may stay on purpose, with memory that is newer than the disk.
        patience = AGENTS_END_TIMEOUT_S if code in (ExitCode.DONE, ExitCode.INTERRUPTED) else FAILED_END_TIMEOUT_S
        sweep(folder, [options.node for options in nodes], patience)
    return code


class Nodes:
    """Supervisors as children of this process."""

    def __init__(self, nodes: Sequence[Options], job: JobSpec) -> None:
        self._parent = os.getpid()
        self._pids: list[int] = []
        self._codes: dict[int, int] = {}
        self._early: list[int] = []
        """Signals that arrived before all supervisors had been started."""
        self._started = False
        signals.handle(_HANDLED, self._forward)
        for options in nodes:
            self._pids.append(self._fork(options, job))

    def _fork(self, options: Options, job: JobSpec) -> int:
        with signals.held(_HANDLED):
            pid = os.fork()
            if not pid:
                self._run_child(options, job)
            return pid

    def _run_child(self, options: Options, job: JobSpec) -> NoReturn:
        code: int = ExitCode.FAULT
        try:
            leave_on(*_HANDLED)  # until it is a supervisor
            signals.release(_HANDLED)
            from keepwarm.launch.forkserver import die_with
            from keepwarm.launch.node.supervisor import supervise

            os.setsid()
            die_with(self._parent)
            if (gpus := own_gpus(len(self._pids), options.ranks_per_node, os.environ)) is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus
            code = supervise(options, job)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def run(self) -> int:
        """Wait for all supervisors; return the exit code that most of the survivors agree on."""
        self._started = True
        for number in self._early:
            self._forward(number, None)
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            for pid in self._pids:
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                selector.register(descriptor, selectors.EVENT_READ, pid)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    _, status = os.waitpid(key.data, 0)
                    self._codes[key.data] = os.waitstatus_to_exitcode(status)
        survivors = [code for code in self._codes.values() if code >= 0]
        if not survivors:
            print("keepwarm: every node was lost; --resume continues from the newest checkpoint", file=sys.stderr)
        # A node that was drained ended before the run: of codes that are as frequent, the last one is the run's.
        return max(reversed(survivors), key=survivors.count, default=ExitCode.UNRECOVERABLE)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if not self._started:
            self._early.append(number)
            return
        # SIGINT stays SIGINT: the second one kills the workers. SIGTERM would be about a single node.
        forwarded = signal.SIGINT if number == signal.SIGINT else signal.SIGUSR1
        for pid in self._pids:
            if pid not in self._codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, forwarded)


def own_gpus(number: int, ranks: int, environment: Mapping[str, str]) -> str | None:
    """Return the CUDA_VISIBLE_DEVICES of a node, counted from 0: as many GPUs of this machine as it has ranks.

    NCCL refuses two ranks on one GPU. None if there are no GPUs here.
    """
    gpus = visible_gpus(environment)
    return ",".join(gpus[number * ranks : (number + 1) * ranks]) if gpus else None


def sweep(folder: Path, nodes: Sequence[str], patience: float) -> None:
    """Wait for the agents to end, and remove what the agents of killed nodes left on this machine."""
    try:
        run = run_identity(load_secret(folder / SECRET))
    except FtError:
        return
    left = set()
    for node in nodes:
        os.environ[NODE] = node
        left |= {*runtime_folders(run)}
    end = time.monotonic() + patience
    while left and time.monotonic() < end:
        for path in list(left):
            with contextlib.suppress(FtError, OSError):
                if path.is_dir():
                    clear(path, take_lock(path))
                left.discard(path)
        time.sleep(0.05 if left else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
