"""Which rank this process is, from the environment that its launcher set: torchrun, srun, Open MPI, MPICH or another's.

torchrun's variables are the common language: `adopt_launcher` writes them where another launcher left its own.
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
"""Where rank 0 listens; below the ports that Linux gives out by itself."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A process among those that a launcher started together."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str | None
    """Host of rank 0; None: the environment does not tell."""
    port: int
    """On that host, alike for all ranks, different for most launches."""
    restarts: int = 0


ADDED_LAUNCHERS: Registry[Callable[[Mapping[str, str]], Ranks | None]] = Registry("launcher", "keepwarm.launchers", {})
"""Functions of other packages that read a rank from the environment; None where it was not set by their launcher."""


def ranks_from(environment: Mapping[str, str]) -> Ranks | None:
    """What a launcher other than torchrun says; None without one, and when torchrun's variables are there.

    Open MPI comes first: inside an allocation its ranks see the batch system's variables as well, those of another
    program. MPICH comes last: others set its variables too, for MPI libraries.

    Raises:
        SpecError: a launcher that another package added cannot be imported.
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
    """The first name of a SLURM node list: `gpu-[07-09,12],login` gives `gpu-07`."""
    match = re.match(r"[^,\[]+", nodes)
    if match is None:
        raise SpecError(f"SLURM's node list {nodes!r} begins with no name: set MASTER_ADDR to the host of rank 0")
    name, rest = match.group(), nodes[match.end() :]
    while rest.startswith("["):
        inside, _, rest = rest[1:].partition("]")
        name += re.split("[-,]", inside, maxsplit=1)[0]
        suffix = re.match(r"[^,\[]*", rest)
        name += suffix.group() if suffix else ""
        rest = rest[suffix.end() :] if suffix else rest
    return name


def adopt_launcher() -> None:
    """Write torchrun's variables into `os.environ`, and KEEPWARM_HOST: the address of this node that others reach.

    Raises:
        SpecError: the launcher does not tell where rank 0 is, and MPI cannot be asked.
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
    """The address of this host on the way to another; None when there is no way, or no other."""
    if peer is None:
        return None
    try:
        family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: the kernel chooses the way
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
    told = "/".join(environment.get(name, "") for name in names)
    return PORTS[zlib.crc32(told.encode()) % len(PORTS)]
