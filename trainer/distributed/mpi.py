"""The address of rank 0, asked of MPI itself where the launcher's environment lacks it."""

import socket

from keepwarm.trainer.errors import SpecError


def address_of_rank_0(launcher: str, size: int) -> tuple[str, int]:
    """Return the host name and a free port of rank 0, of `size` ranks that `launcher` started.

    Collective over MPI's world, which is finalised afterwards.

    Raises:
        SpecError: mpi4py is missing, or MPI cannot start.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SpecError(
            f"{launcher} started {size} ranks on several nodes and does not say where rank 0 is: "
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
