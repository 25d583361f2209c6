"""Choose the device of each rank. All ranks agree on it through the store, before any collective.

Without that, a node whose GPUs cannot be used trains on its CPU in silence, or keeps all others waiting without a name.
"""

import os
import socket
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Literal

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from keepwarm.ft.discovery.config import NODE
from keepwarm.trainer.errors import DeviceBroken, RendezvousFailed, SpecError
from keepwarm.trainer.job.sections import ClusterSpec

NAMED = 4
"""Hosts that an error names; the others are counted."""
READ_TIMEOUT = timedelta(seconds=30)
"""How long rank 0, which may host the store, waits until all ranks have read a refusal."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The device that a job asks for."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the accelerator that torch has, such as CUDA, if every rank sees one, the CPU if none does."""
    key: str = "cluster.device = auto"
    """The key and the value that ask for it, for errors."""

    @classmethod
    def of(cls, cluster: ClusterSpec) -> "Request":
        """Return the request of a job. One that requests GPUs from a batch system asks for CUDA, unless it says cpu."""
        if cluster.device != "auto":
            return cls(device=cluster.device, key=f"cluster.device = {cluster.device}")
        for name, batch in (("slurm", cluster.slurm), ("kubernetes", cluster.kubernetes)):
            if batch is not None and batch.gpus_per_node is not None:
                return cls(device="cuda", key=f"cluster.{name}.gpus_per_node = {batch.gpus_per_node}")
        if cluster.slurm is not None and cluster.slurm.gpus:
            return cls(device="cuda", key=f"cluster.slurm.gres = {','.join(cluster.slurm.gres)}")
        return cls()


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank sees of its host's GPUs."""

    rank: int
    host: str
    visible: int
    """Number of GPUs that this process can use."""
    kind: str = "cuda"
    """What torch calls them."""
    card: str = ""
    """Identifies the GPU that this rank would take, among all machines; empty if it cannot be identified."""
    reason: str = ""
    """Why no GPU is visible."""
    restarts: int = 0


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The kind of device that all ranks take, or why they cannot."""

    kind: str = "cpu"
    problem: str = ""
    """Empty if there is none."""
    at_fault: tuple[int, ...] = ()
    """Ranks without a GPU of their own."""
    restarted: bool = False
    """Whether these ranks have run before: their nodes had GPUs then."""


def decide(request: Request, seen: Sequence[Seen]) -> Verdict:
    """Return the verdict on what all ranks see. Pure."""
    restarted = any(one.restarts for one in seen)
    blind = [one for one in seen if not one.visible]
    if request.device == "cpu" or (request.device == "auto" and len(blind) == len(seen)):
        return Verdict()
    if blind:
        others = "" if len(blind) == len(seen) else ", but to the other ranks one is"
        problem = f"{request.key}: no GPU is visible to {_places(blind)}{others}: {blind[0].reason}"
        return Verdict(
            problem=f"{problem}; mend that, or set cluster.device = cpu",
            at_fault=tuple(one.rank for one in blind),
            restarted=restarted,
        )
    holders: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        if one.card:
            holders[one.card].append(one)
    for same in holders.values():
        if len(same) > 1:
            problem = f"{request.key}: {_places(same)} would share one GPU, {same[0].visible} visible to each"
            return Verdict(
                problem=f"{problem}; start as many ranks on a node as it has GPUs (cluster.ranks_per_node)",
                at_fault=tuple(one.rank for one in same[1:]),
                restarted=restarted,
            )
    kinds = {one.kind: one for one in seen}
    if len(kinds) > 1:
        places = "; ".join(f"{kind} for {_places([one])}" for kind, one in sorted(kinds.items()))
        return Verdict(problem=f"{request.key}: the devices are of different kinds: {places}", restarted=restarted)
    return Verdict(kind=seen[0].kind)


def index_of(local_rank: int, visible: int) -> int:
    """Return the index of a rank's GPU among those that it sees: `srun --gpus-per-task=1` leaves one to each."""
    return local_rank % visible


def look(request: Request, rank: int, local_rank: int, restarts: int) -> Seen:
    """Return what this rank sees; without asking CUDA if the job is to run on the CPU."""
    host = os.environ.get(NODE) or socket.gethostname()
    kind = _accelerator(request)
    visible = torch.accelerator.device_count() if kind else 0
    if not visible:
        return Seen(rank=rank, host=host, visible=0, reason=_why_none(), restarts=restarts)
    try:
        mine = torch.get_device_module(kind).get_device_properties(index_of(local_rank, visible))
    except RuntimeError as error:  # a GPU that is listed and cannot be used
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return Seen(rank=rank, host=host, visible=0, reason=reason, restarts=restarts)
    card = getattr(mine, "uuid", None)
    # Nodes that are emulated on one machine have names of their own.
    where = "" if card is None else f"{socket.gethostname()} {card}"
    return Seen(rank=rank, host=host, visible=visible, kind=kind, card=where, restarts=restarts)


def _accelerator(request: Request) -> str:
    """Return what torch calls the devices that a job may run on besides the CPU; empty if it has none of them.

    Those whose collectives torch does not know are not taken.
    """
    found = None if request.device == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    if found is None or request.device not in ("auto", found.type):
        return ""
    with suppress(ValueError):
        dist.get_default_backend_for_device(found)
        return found.type
    return ""


def pci_address(device: torch.device) -> str:
    """Return the PCI address of a GPU, such as `0000:19:00.0`; one that no device has if torch does not know it."""
    known = torch.cuda.get_device_properties(device)
    domain, bus, slot = (getattr(known, f"pci_{part}_id", 0) for part in ("domain", "bus", "device"))
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def agree(store: Store | None, request: Request, mine: Seen, size: int, deadline: timedelta) -> str:
    """Return the kind of device that all ranks take. Collective, through the store alone; a rank alone has none.

    Raises:
        SpecError: on every rank, where ranks have no GPU of their own and the job asks for one.
        RendezvousFailed: ranks did not arrive.
        DeviceBroken: after a restart, this rank has lost its GPU. The others go on then and wait for the restart that
            follows, so that its node is replaced.
    """
    verdict = _exchanged(store, request, mine, size, deadline)
    if not verdict.problem:
        return verdict.kind
    if not verdict.restarted:
        raise SpecError(verdict.problem)
    if mine.rank in verdict.at_fault:
        raise DeviceBroken(verdict.problem)
    return mine.kind


def _exchanged(store: Store | None, request: Request, mine: Seen, size: int, deadline: timedelta) -> Verdict:
    if store is None:
        return decide(request, [mine])
    store.set(f"device/seen/{mine.rank}", msgspec.json.encode(mine).decode())
    if mine.rank:
        try:
            store.wait(["device/verdict"], deadline)
        except dist.DistError as error:
            raise RendezvousFailed(f"rank {mine.rank}: waited {deadline} for rank 0 to choose the device") from error
        verdict = msgspec.json.decode(store.get("device/verdict"), type=Verdict)
        if verdict.problem:
            store.set(f"device/read/{mine.rank}", "")
        return verdict
    keys = [f"device/seen/{rank}" for rank in range(1, size)]
    try:
        store.wait(keys, deadline)
    except dist.DistError as error:
        late = next((rank for rank, key in enumerate(keys, 1) if not store.check([key])), 0)
        raise RendezvousFailed(f"rank 0: waited {deadline} for rank {late} to look for its GPU") from error
    # torch's stubs lack this method; the file store has no requests for several keys.
    several = store.has_extended_api()  # type: ignore[attr-defined]
    found = store.multi_get(keys) if several else map(store.get, keys)
    verdict = decide(request, [mine, *(msgspec.json.decode(one, type=Seen) for one in found)])
    store.set("device/verdict", msgspec.json.encode(verdict).decode())
    if verdict.problem:
        with suppress(dist.DistError):
            store.wait([f"device/read/{rank}" for rank in range(1, size)], READ_TIMEOUT)
    return verdict


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return f"torch finds none with CUDA_VISIBLE_DEVICES={chosen}"
    return "torch finds none: see nvidia-smi, and the GPU option of the container (apptainer --nv)"


def _places(ranks: Sequence[Seen]) -> str:
    """Return ranks by host, `rank 3 on a; ranks 4, 5 on b`."""
    hosts: dict[str, list[int]] = defaultdict(list)
    for one in ranks:
        hosts[one.host].append(one.rank)
    parts = [
        f"{'rank' if len(here) == 1 else 'ranks'} {', '.join(map(str, here))} on {host}"
        for host, here in list(hosts.items())[:NAMED]
    ]
    if len(hosts) > NAMED:
        parts.append(f"ranks of {len(hosts) - NAMED} more hosts")
    return "; ".join(parts)
