"""Runs a plain function on every rank of a world of gloo processes.

Rank processes are forked from one server that has torch imported already, and are kept and used again: a case costs
a rendezvous, not an import. After a failure all processes of that world are killed and the next case forks new ones.
"""

import atexit
import faulthandler
import gc
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from tests.support import rank_preload

ROOT = Path(__file__).parents[2]

ALLOWED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = ()
"""Regular expression and category of the warnings that do not fail a rank; every other one does."""

_END = b""
"""Sent to a rank when all have finished a case: only now may one of them end the groups that others used."""
_context = get_context("forkserver")
_pools: dict[int, "_Pool"] = {}


class RankFailure(AssertionError):
    """A rank raised, ended or did not finish in time; the message says which, and shows tracebacks or stacks."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, deadline: float = 60.0) -> list[Any]:
    """Call `fn(*args)` on every rank of a new gloo world and return the results in the order of ranks.

    `fn` is importable by name (a module-level function) and finds its rank with `torch.distributed.get_rank()`.
    It runs with one thread, seed 0 and warnings as errors. Results are pickled: return plain values, arrays
    or CPU tensors. What a function patches it must put back, the process lives on.

    Raises:
        RankFailure: any rank raised or exited, or some had not finished after `deadline` seconds.
    """
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = _Pool(world_size)
    try:
        return pool.run(fn, args, deadline)
    except BaseException:
        del _pools[world_size]
        pool.kill()
        raise


def close_pools() -> None:
    """End all idle rank processes."""
    while _pools:
        _pools.popitem()[1].kill()


class _Pool:
    """The processes of one world, idle between cases."""

    def __init__(self, world_size: int) -> None:
        _start_server()
        self.world_size = world_size
        self.folder = tempfile.TemporaryDirectory(prefix="keepwarm-ranks-")
        self.path = Path(self.folder.name)
        self.cases = 0
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            here, there = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(there, rank, world_size, str(self.path)), name=f"rank {rank}", daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], deadline: float) -> list[Any]:
        self.cases += 1
        end = time.monotonic() + deadline
        order = pickle.dumps((fn, args, str(self.path / f"rendezvous-{self.cases}"), deadline))
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send_bytes(order)
            except BrokenPipeError:
                raise RankFailure(self._exited(rank)) from None
        results: dict[int, Any] = {}
        waiting: dict[object, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting:
            ready = connection.wait([self.pipes[rank] for rank in waiting.values()], max(0.0, end - time.monotonic()))
            if not ready:
                raise RankFailure(self._late(sorted(waiting.values()), deadline))
            failures = []
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    done, value = pickle.loads(self.pipes[rank].recv_bytes())  # noqa: S301 (our own child's pipe)
                except (EOFError, ConnectionResetError):
                    failures.append(self._exited(rank))
                    continue
                results[rank] = value
                if not done:
                    failures.append(f"rank {rank} of {self.world_size} raised:\n{value}")
            if failures:
                raise RankFailure("\n".join(failures))
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # who has ended since is reported by the next case
                pipe.send_bytes(_END)
        return [results[rank] for rank in range(self.world_size)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()

    def _exited(self, rank: int) -> str:
        process = self.processes[rank]
        process.join(5.0)
        code = process.exitcode
        how = "is still alive" if code is None else f"exited with code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        return f"rank {rank} of {self.world_size} {how} without a result\n{self._stack(rank)}"

    def _late(self, missing: list[int], deadline: float) -> str:
        # SIGABRT makes faulthandler write every thread's stack and then ends the process.
        for rank in missing:
            os.kill(self.processes[rank].pid, signal.SIGABRT)
        for rank in missing:
            self.processes[rank].join(5.0)
        finished = [rank for rank in range(self.world_size) if rank not in missing]
        stacks = "\n".join(f"--- rank {rank}\n{self._stack(rank)}" for rank in missing)
        return (
            f"ranks {missing} of {self.world_size} not finished after {deadline:g} s (finished: {finished})\n{stacks}"
        )

    def _stack(self, rank: int) -> str:
        file = _stack_file(self.path, rank)
        lines = file.read_text().splitlines() if file.exists() else []
        # Below `_case` lies the harness; the list of extension modules tells nothing.
        ours = [line for line in lines if line and not line.startswith("Extension modules:")]
        below = next((i for i, line in enumerate(ours) if line.endswith(" in _case")), len(ours))
        return "\n".join(ours[:below]) or "(no stack)"


def _start_server() -> None:
    """Start the fork server with one thread per process, whatever this process's environment says."""
    ours = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "KEEPWARM_TEST_PROCESS": str(os.getpid()),
    }
    before = {key: os.environ.get(key) for key in ours}
    _context.set_forkserver_preload([rank_preload.__name__, "pytest"])
    os.environ.update(ours)
    try:
        forkserver.ensure_running()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def _serve(pipe: Any, rank: int, world_size: int, folder: str) -> None:
    """Main function of a rank process: one case after the other until the pipe closes."""
    rank_preload.die_with(os.getppid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    with _stack_file(Path(folder), rank).open("w") as stack:
        faulthandler.enable(stack, all_threads=True)
        while True:
            try:
                order = pipe.recv_bytes()
                if order == _END:
                    _end_groups()
                    continue
                fn, args, rendezvous, deadline = pickle.loads(order)  # noqa: S301 (our own parent's pipe)
            except EOFError:
                return
            except BaseException:
                pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
                return
            try:
                answer = pickle.dumps((True, _case(fn, args, rank, world_size, rendezvous, deadline)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            sys.stdout.flush()
            sys.stderr.flush()
            pipe.send_bytes(answer)


def _case(
    fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, rendezvous: str, deadline: float
) -> Any:
    random.seed(0)
    torch.manual_seed(0)
    store = FileStore(rendezvous, world_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message, category in ALLOWED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        # Longer than the deadline: the parent's report with every stack beats one rank's time-out.
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=2 * deadline)
        )
        return fn(*args)


def _end_groups() -> None:
    """End the groups of a case and their threads, which wake up hundreds of times a second while they live.

    Wrapped modules hold groups in reference cycles: without the collection thousands of threads pile up.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


atexit.register(close_pools)
