"""Read the rank of this process from the environment of its launcher: torchrun, srun, Open MPI, MPICH or an added one.

`adopt_launcher` translates the variables of other launchers into those of torchrun, which everything else reads.
"""

import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from keepwarm.registry import Registry, UnusableComponent
from keepwarm.trainer.distributed.mpi import address_of_rank_0
from keepwarm.trainer.errors import SpecError

PORTS = range(20_000, 32_000)
"""Ports on which rank 0 may listen; below Linux's range of ephemeral ports."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One of the processes that a launcher started together."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str | None
    """Host of rank 0; None: not in the environment."""
    port: int
    """Port on that host: equal on all ranks, different for most launches."""
    restarts: int = 0


ADDED_LAUNCHERS: Registry[Callable[[Mapping[str, str]], Ranks | None]] = Registry("launcher", "keepwarm.launchers", {})
"""Functions of other packages that read a rank from the environment, or return None if it is not their launcher's."""


def ranks_from(environment: Mapping[str, str]) -> Ranks | None:
    """Return the rank set by a launcher other than torchrun; None without one, or if torchrun's variables are set.

    Open MPI comes first: inside an allocation its ranks also see the batch system's variables, which describe another
    program. MPICH comes last: other launchers set its variables too, for MPI libraries.

    Raises:
        SpecError: an added launcher cannot be imported.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return None
    try:
        added = [ADDED_LAUNCHERS.get(name) for name in ADDED_LAUNCHERS.names()]
    except UnusableComponent as error:
        raise SpecError(str(error)) from error
    for read in (_open_mpi, *added, _slurm, _mpich):
        found = read(environment)
        if found is not None:
            return found
    return None


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM node list: `gpu-07` for `gpu-[07-09,12],login`."""
    match = re.match(r"[^,\[]+", nodes)
    if match is None:
        raise SpecError(f"SLURM's node list {nodes!r} lacks a first name: set MASTER_ADDR to the host of rank 0")
    name, rest = match.group(), nodes[match.end() :]
    while rest.startswith("["):
        inside, _, rest = rest[1:].partition("]")
        name += re.split("[-,]", inside, maxsplit=1)[0]
        suffix = re.match(r"[^,\[]*", rest)
        name += suffix.group() if suffix else ""
        rest = rest[suffix.end() :] if suffix else rest
    return name


def adopt_launcher() -> None:
    """Set torchrun's variables in `os.environ`, and KEEPWARM_HOST: the address at which other nodes reach this one.

    Raises:
        SpecError: the launcher does not set the address of rank 0, and MPI cannot be asked.
    """
    ranks = ranks_from(os.environ)
    if ranks is not None and ranks.size > 1:
        address, port = os.environ.get("MASTER_ADDR") or ranks.address, ranks.port
        if address is None:
            address, port = address_of_rank_0(ranks.launcher, ranks.size)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))
        os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", str(ranks.restarts))
        os.environ |= {
            "RANK": str(ranks.rank),
            "WORLD_SIZE": str(ranks.size),
            "LOCAL_RANK": str(ranks.local_rank),
        }
    host = own_address(os.environ.get("MASTER_ADDR"))
    if host is not None:
        os.environ.setdefault("KEEPWARM_HOST", host)


def own_address(peer: str | None) -> str | None:
    """Return the address from which this host reaches `peer`; None without a route or a peer."""
    if peer is None:
        return None
    try:
        family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: the kernel chooses a route
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _open_mpi(environment: Mapping[str, str]) -> Ranks | None:
    size = environment.get("OMPI_COMM_WORLD_SIZE")
    if size is None:
        return None
    one_host = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == size
    return Ranks(
        launcher="Open MPI",
        rank=int(environment["OMPI_COMM_WORLD_RANK"]),
        size=int(size),
        local_rank=int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")),
        address="127.0.0.1" if one_host else None,
        port=_port(environment, "PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_ess_base_jobid"),
    )


def _slurm(environment: Mapping[str, str]) -> Ranks | None:
    size, nodes = environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_STEP_NODELIST")
    if size is None or nodes is None or "SLURM_PROCID" not in environment:
        return None
    return Ranks(
        launcher="srun",
        rank=int(environment["SLURM_PROCID"]),
        size=int(size),
        local_rank=int(environment.get("SLURM_LOCALID", "0")),
        address=first_host(nodes),
        port=_port(environment, "SLURM_JOB_ID", "SLURM_STEP_ID"),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


def _mpich(environment: Mapping[str, str]) -> Ranks | None:
    size = environment.get("PMI_SIZE")
    if size is None or "PMI_RANK" not in environment:
        return None
    one_host = environment.get("MPI_LOCALNRANKS") == size
    return Ranks(
        launcher="MPICH",
        rank=int(environment["PMI_RANK"]),
        size=int(size),
        local_rank=int(environment.get("MPI_LOCALRANKID", "0")),
        address="127.0.0.1" if one_host else None,
        port=_port(environment, "PMI_PORT", "PMI_JOBID"),
    )


def _port(environment: Mapping[str, str], *names: str) -> int:
    identity = "/".join(environment.get(name, "") for name in names)
    return PORTS[zlib.crc32(identity.encode()) % len(PORTS)]
