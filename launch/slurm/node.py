"""Node task of a SLURM step: `python -P -m keepwarm.launch.slurm.node RUN [--resume]` becomes the node's supervisor.

Adds what only the node itself knows: its name and the address at which the other nodes of the step reach it.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from keepwarm.trainer.distributed.launcher_environment import first_host, own_address
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RunFolder


def supervisor(arguments: list[str], slots: int, environment: Mapping[str, str]) -> list[str]:
    """Return the arguments of `keepwarm.launch.node.main` for this task."""
    host = own_address(first_host(environment["SLURM_STEP_NODELIST"]))
    node = environment["SLURMD_NODENAME"]
    return [*arguments, f"--slots={slots}", f"--node={node}", f"--host={host or node}"]


def main() -> None:
    """Replace this process with the supervisor, so that SLURM's signals reach it directly."""
    slots = load_run(RunFolder(Path(sys.argv[1])).run_file).layout.nodes
    told = supervisor(sys.argv[1:], slots, os.environ)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "keepwarm.launch.node", *told])


if __name__ == "__main__":
    main()
