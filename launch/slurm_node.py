"""One task per node of a SLURM step: `python -P -m launch.slurm_node RUN [--resume]` becomes the node's supervisor.

It adds what only the node itself knows: its name, and the address at which the other nodes of the step reach it.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.launcher_environment import first_host, own_address
from trainer.run_folder import RunFolder
from trainer.spec_file import load_run


def supervisor(arguments: list[str], slots: int, environment: Mapping[str, str]) -> list[str]:
    """The arguments of `launch.node` for this task."""
    host = own_address(first_host(environment["SLURM_STEP_NODELIST"]))
    node = environment["SLURMD_NODENAME"]
    return [*arguments, f"--slots={slots}", f"--node={node}", f"--host={host or node}"]


def main() -> None:
    """Replace this process, so that SLURM's signals reach the supervisor itself."""
    slots = load_run(RunFolder(Path(sys.argv[1])).run_file).layout.nodes
    told = supervisor(sys.argv[1:], slots, os.environ)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "launch.node", *told])


if __name__ == "__main__":
    main()
