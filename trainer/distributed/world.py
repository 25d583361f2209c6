"""The process group of a run: this rank, its device, and collectives with the other ranks."""

import contextlib
import itertools
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from keepwarm.parallel.spec import NumericsSpec
from keepwarm.trainer.distributed import device
from keepwarm.trainer.distributed.launcher_environment import adopt_launcher
from keepwarm.trainer.distributed.meeting import Meeting
from keepwarm.trainer.distributed.start_id import agree
from keepwarm.trainer.errors import RendezvousFailed, SpecError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Deadline of every collective; the error names a rank that does not arrive."""
NAME_TIMEOUT_S = 60.0
"""How long the name of rank 0's host may take to become known, as that of a new pod."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Created by `join`, left by `leave`. Without peers there is no process group."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    restarts: int = 0
    """How often the ranks of this run have begun again: the largest count of all launchers."""
    store: Store | None = field(default=None, compare=False, repr=False)
    """Shared by the ranks of this start; None without peers."""
    _interrupted: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)
    _meetings: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on at least one rank. Collective."""
        return bool(self.largest(int(flag)))

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' values. Collective."""
        return self.largest_each([value])[0]

    def largest_each(self, values: Sequence[int]) -> list[int]:
        """Return the largest of all ranks' values at every place, in one collective. All ranks give as many."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, device=self.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        agreed: list[int] = numbers.tolist()
        return agreed

    def gather(self, data: bytes) -> list[bytes]:
        """Return the data of every rank, by rank, on rank 0; an empty list elsewhere. Collective.

        On CPU tensors: NCCL would give rank 0 a connection with buffers on its GPU to every other rank.
        """
        if self.size == 1:
            return [data]
        length = self.largest(len(data))
        mine = torch.zeros(length + 8, dtype=torch.uint8)
        mine[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        if data:
            mine[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        whole = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(mine, whole, dst=0)
        found = (one.numpy().tobytes() for one in whole or ())
        return [one[8 : 8 + int.from_bytes(one[:8], "little")] for one in found]

    def barrier(self) -> None:
        """Wait until every rank has arrived."""
        if self.size > 1:
            dist.barrier()

    def meeting(self, moved: Callable[[], object]) -> Meeting:
        """Return the next meeting of all ranks, which must create the same ones; `moved` is called while any moves."""
        return Meeting(
            store=self.store,
            name=f"meeting/{next(self._meetings)}",
            size=self.size,
            stall=COLLECTIVE_TIMEOUT,
            stopped=self._interrupted,
            moved=moved,
        )

    def interrupt(self) -> None:
        """Make every pending and later collective of this process fail. Call it from another thread.

        NCCL's communicators are aborted, which also removes all process groups. gloo has no abort (torch 2.13): all TCP
        connections of the process are shut down, the store's among them, as if all peers had died.
        """
        self._interrupted.set()
        if self.device.type != "cpu" and dist.is_initialized():
            torch.accelerator.set_device_index(self.device)  # a thread begins on the first one, which is another rank's
            dist.distributed_c10d._abort_process_group()  # first: while NCCL works, its own connections must live
        for descriptor in (int(path.name) for path in Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    _shut(descriptor)

    def check_interrupted(self) -> None:
        """Raise RuntimeError if this process was interrupted: a collective that NCCL aborts returns garbage in silence.

        On CPUs gloo raises an error by itself.
        """
        if self.device.type != "cpu" and self._interrupted.is_set():
            raise RuntimeError("a collective was aborted, as peers have died")

    def leave(self) -> None:
        """Destroy the process group, unless it was aborted, and give cached memory back to the GPU."""
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()
        if dist.is_initialized():
            dist.destroy_process_group()


def _shut(descriptor: int) -> None:
    """Shut down a TCP connection, leaving the descriptor to its owner."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        # A listening socket has no peer; when it is shut, gloo ends the process.
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
            connection.shutdown(socket.SHUT_RDWR)


def join(expected: int, numerics: NumericsSpec, request: device.Request | None = None) -> World:
    """Join the ranks that the launcher started, as described by its environment variables.

    Args:
        expected: number of ranks of the layout.
        numerics: threads are set before the first operation, deterministic libraries before they are loaded.
        request: the device that the job asks for; None: CUDA if all ranks see a GPU.

    Raises:
        SpecError: the launcher started a different number of ranks, or names no usable network interface or host; or
            ranks lack the device that the job asks for.
        RendezvousFailed: the ranks do not reach each other.
    """
    torch.set_num_threads(numerics.threads_per_rank)
    if numerics.deterministic:
        for key, value in _REPEATABLE.items():
            os.environ.setdefault(key, value)
    adopt_launcher()
    rank, size, local_rank = (_number(key, default) for key, default in _FROM_TORCHRUN)
    restarts = _number("TORCHELASTIC_RESTART_COUNT", "0")
    if size != expected:
        raise SpecError(
            f"the layout has {expected} ranks (parallel.data x pipeline x tensor), but {size} were started: "
            f"start {expected}, or change parallel.*"
        )
    request = request or device.Request()
    seen = device.look(request, rank, local_rank, restarts)
    store: Store | None = None
    if size > 1:
        check_interfaces(os.environ, [name for _, name in socket.if_nameindex()], cuda=seen.visible > 0)
    with _reached():
        if size > 1:
            store = _store(rank, size)
        kind = device.agree(store, request, seen, size, COLLECTIVE_TIMEOUT)
    chosen = _chosen(kind, local_rank, seen)
    if store is not None:
        with _reached():
            _connect(store, rank, size, chosen)
    world = World(rank=rank, size=size, local_rank=local_rank, device=chosen, store=store)
    # The launcher of a replacement node counts from zero.
    return replace(world, restarts=world.largest(restarts))


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Raise RendezvousFailed in place of torch's errors of the network."""
    try:
        yield
    except RuntimeError as error:
        raise RendezvousFailed(f"the ranks do not reach each other{_place()}: {_first_line(error)}") from error


def _chosen(kind: str, local_rank: int, seen: device.Seen) -> torch.device:
    """Return this rank's device, which becomes the current one."""
    if kind == "cpu":
        return torch.device("cpu")
    chosen = torch.device(kind, device.index_of(local_rank, seen.visible))
    torch.accelerator.set_device_index(chosen)
    return chosen


_REPEATABLE = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""A fixed order of summation for all sizes and a fixed workspace, for bitwise equal runs on CUDA."""

_FROM_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _store(rank: int, size: int) -> Store:
    """Return the store of this start: the one that our launchers make for it, else a part of torchrun's store."""
    own = os.environ.get("KEEPWARM_STORE")
    if own is not None and own.startswith("/"):
        return FileStore(str(Path(own)), size)
    if own is not None:
        host, _, port = own.rpartition(":")
        return TCPStore(host, int(port), is_master=False, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False)
    _find_host(os.environ.get("MASTER_ADDR", "localhost"))
    _number("MASTER_PORT", "0", most=65_535)
    shared, rank, size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    return PrefixStore(f"keepwarm/{agree(shared, rank, size, COLLECTIVE_TIMEOUT)}", shared)


def _connect(store: Store, rank: int, size: int, chosen: torch.device) -> None:
    """Create the process group of all ranks: gloo, and on GPUs NCCL, whose communicators the engine's are split from.

    NCCL connects here because the device is named, not within the first steps.
    """
    on_gpu = chosen.type != "cpu"
    backend = f"cpu:gloo,{chosen.type}:{dist.get_default_backend_for_device(chosen)}" if on_gpu else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=chosen if on_gpu else None,
    )


def check_interfaces(environment: Mapping[str, str], known: Sequence[str], *, cuda: bool) -> None:
    """Raise SpecError if gloo or NCCL is to use network interfaces that this host does not have. Pure."""
    for name in ("GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if cuda else [])):
        asked = environment.get(name, "")
        # NCCL takes prefixes, `^` for all but these and `=` for exact names.
        is_exact = name.startswith("GLOO") or asked.startswith("=")
        if not asked or (asked.startswith("^") and not name.startswith("GLOO")):
            continue
        words = asked.removeprefix("=").split(",")
        found = [word in known if is_exact else any(one.startswith(word) for one in known) for word in words]
        if not (all(found) if name.startswith("GLOO") else any(found)):
            raise SpecError(f"{name}={asked}: {socket.gethostname()} has no such network interface: {', '.join(known)}")


def _find_host(name: str) -> None:
    """Raise SpecError unless the name or address of rank 0's host is known within NAME_TIMEOUT_S."""
    end = time.monotonic() + NAME_TIMEOUT_S
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end:
                why = getattr(error, "strerror", None) or error
                raise SpecError(
                    f"MASTER_ADDR={name}: no such host ({why}); set it to the host of rank 0, as this one sees it"
                ) from error
        time.sleep(1.0)


def _number(variable: str, default: str, most: int = 2**31 - 1) -> int:
    text = os.environ.get(variable, default)
    if not text.isascii() or not text.isdecimal() or int(text) > most:
        raise SpecError(f"{variable}={text}: expected a whole number of at most {most}, as the launcher sets it")
    return int(text)


def _place() -> str:
    return f" at MASTER_ADDR={os.environ['MASTER_ADDR']}" if "MASTER_ADDR" in os.environ else ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
