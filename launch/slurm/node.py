"""Node task of a SLURM step: `python -P -m keepwarm.launch.slurm.node RUN [OPTIONS]` runs the node's supervisor.

Adds what only the node itself knows: its name and the address at which the other nodes of the step reach it. Tells the
watcher of its node how the supervisor ended.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from keepwarm.launch.slurm.domains import PLACE, own_place
from keepwarm.launch.slurm.watcher import reported
from keepwarm.trainer.distributed.launcher_environment import first_host, own_address
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE


def supervisor(arguments: list[str], slots: int, environment: Mapping[str, str]) -> list[str]:
    """Return the arguments of `keepwarm.launch.node.main` for this task."""
    host = own_address(first_host(environment["SLURM_STEP_NODELIST"]))
    node = environment["SLURMD_NODENAME"]
    arguments = [each for one in arguments for each in (own_place(one, node) if one.startswith(PLACE) else [one])]
    return [*arguments, f"--slots={slots}", f"--node={node}", f"--host={host or node}"]


def _spec(arguments: list[str]) -> Path:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spec", default=RUN_FILE)
    given, _ = parser.parse_known_args(arguments)
    return Path(given.folder / given.spec)


def main() -> None:
    """Run the supervisor, and end as it does."""
    slots = load_run(_spec(sys.argv[1:])).layout.nodes
    told = supervisor(sys.argv[1:], slots, os.environ)
    # SLURM's signals reach the supervisor directly. An ignored one would stay so in it; a handled one does not.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with reported(os.environ) as report:
        done = subprocess.run([sys.executable, "-P", "-m", "keepwarm.launch.node", *told], check=False)
        report(done.returncode if done.returncode >= 0 else 128 - done.returncode)
    if done.returncode < 0:
        with contextlib.suppress(OSError):  # of SIGKILL, which cannot be handled anyway
            signal.signal(-done.returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -done.returncode)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
