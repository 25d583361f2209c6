"""Ask MPI for the address of rank 0 if the launcher's environment lacks it."""

import socket

from keepwarm.trainer.errors import SpecError


def address_of_rank_0(launcher: str, size: int) -> tuple[str, int]:
    """Return the host name and a free port of rank 0, one of `size` ranks started by `launcher`.

    Collective over MPI's world, which is finalised afterwards.

    Raises:
        SpecError: mpi4py is missing, or MPI cannot start.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SpecError(
            f"{launcher} started {size} ranks on several nodes without the address of rank 0: "
            f"pip install 'keepwarm[mpi]', or set MASTER_ADDR to its host ({error})"
        ) from error
    mine = (socket.gethostname(), _free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None
    host, port = MPI.COMM_WORLD.bcast(mine)
    MPI.Finalize()
    return str(host), int(port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
