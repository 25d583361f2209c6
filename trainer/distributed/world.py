"""The process group of a run: this rank, its device, and collectives with the other ranks."""

import contextlib
import os
import socket
import stat
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from keepwarm.parallel.spec import NumericsSpec
from keepwarm.trainer.distributed.launcher_environment import adopt_launcher
from keepwarm.trainer.distributed.start_id import agree
from keepwarm.trainer.errors import SpecError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Deadline of every collective; the error names a rank that does not arrive."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Created by `join`, left by `leave`. Without peers there is no process group."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    restarts: int = 0
    """How often the ranks of this run have begun again: the largest count of all launchers."""

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on at least one rank. Collective."""
        return bool(self.largest(int(flag)))

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' values. Collective."""
        if self.size == 1:
            return value
        number = torch.tensor([value], device=self.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number.item())

    def gather(self, data: bytes) -> list[bytes]:
        """Return the data of every rank, by rank, on rank 0; an empty list elsewhere. Collective."""
        if self.size == 1:
            return [data]
        length = self.largest(len(data))
        mine = torch.zeros(length + 8, dtype=torch.uint8)
        mine[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        if data:
            mine[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        mine = mine.to(self.device)
        whole = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(mine, whole, dst=0)
        found = (one.cpu().numpy().tobytes() for one in whole or ())
        return [one[8 : 8 + int.from_bytes(one[:8], "little")] for one in found]

    def barrier(self) -> None:
        """Wait until every rank has arrived."""
        if self.size > 1:
            dist.barrier()

    def interrupt(self) -> None:
        """Make every pending and later collective of this process fail. Call it from another thread.

        gloo has no abort (torch 2.13): all TCP connections of the process are shut down, the store's among them, as if
        all peers had died. NCCL's communicators are aborted.
        """
        for descriptor in (int(path.name) for path in Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    _shut(descriptor)
        if self.device.type == "cuda" and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    def leave(self) -> None:
        """Destroy the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _shut(descriptor: int) -> None:
    """Shut down a TCP connection, leaving the descriptor to its owner."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        # A listening socket has no peer; when it is shut, gloo ends the process.
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
            connection.shutdown(socket.SHUT_RDWR)


def join(expected: int, numerics: NumericsSpec) -> World:
    """Join the ranks that the launcher started, as described by its environment variables.

    Args:
        expected: number of ranks of the layout.
        numerics: threads are set before the first operation, deterministic libraries before they are loaded.

    Raises:
        SpecError: the launcher started a different number of ranks.
    """
    torch.set_num_threads(numerics.threads_per_rank)
    if numerics.deterministic:
        for key, value in _REPEATABLE.items():
            os.environ.setdefault(key, value)
    adopt_launcher()
    rank, size, local_rank = (int(os.environ.get(key, default)) for key, default in _FROM_TORCHRUN)
    if size != expected:
        raise SpecError(
            f"the layout has {expected} ranks (parallel.data x pipeline x tensor), but {size} were started: "
            f"start {expected}, or change parallel.*"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        _connect(rank, size, "cpu:gloo,cuda:nccl" if cuda else "gloo")
    world = World(rank=rank, size=size, local_rank=local_rank, device=device)
    # The launcher of a replacement node counts from zero.
    return replace(world, restarts=world.largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))


_REPEATABLE = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""A fixed order of summation for all sizes and a fixed workspace, for bitwise equal runs on CUDA."""

_FROM_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _connect(rank: int, size: int, backend: str) -> None:
    """Create the process group through the file of `keepwarm train` on one machine, else through torchrun's store."""
    file = os.environ.get("KEEPWARM_STORE")
    store: Store
    if file is not None:
        store = FileStore(str(Path(file)), size)
    else:
        shared, rank, size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store = PrefixStore(f"keepwarm/{agree(shared, rank, size, COLLECTIVE_TIMEOUT)}", shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
