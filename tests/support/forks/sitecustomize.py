"""Stops one fork before it has done anything, until the test lets it go on; goes on the path of the new processes.

`KEEPWARM_TEST_FORK=NAME:NUMBER:FOLDER` names the n-th fork (from 0) of the process whose module has NAME in its path.
The fork writes its pid to FOLDER/stopped and waits for FOLDER/go.
"""

import itertools
import os
import sys
import time
from pathlib import Path

PATIENCE_S = 120.0
_forks = itertools.count()
_number = -1


def _before() -> None:
    global _number
    _number = next(_forks)


def _in_child() -> None:
    name, number, place = os.environ["KEEPWARM_TEST_FORK"].split(":", 2)
    folder = Path(place)
    if _number != int(number) or name not in sys.argv[0] or (folder / "stopped").exists():
        return
    (folder / "part").write_text(str(os.getpid()))
    (folder / "part").rename(folder / "stopped")
    end = time.monotonic() + PATIENCE_S
    while not (folder / "go").exists() and time.monotonic() < end:
        time.sleep(0.005)


if "KEEPWARM_TEST_FORK" in os.environ:
    os.register_at_fork(before=_before, after_in_child=_in_child)
