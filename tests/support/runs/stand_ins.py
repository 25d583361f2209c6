"""Supervisors as processes, with stand-ins for workers.

The stand-in writes its pid to `ran-<rank>-<restart>`, and ends with the code in the file `code` once that exists. Asked
to end, it creates `asked-<rank>-<restart>`, and ends as soon as the file `saved` exists.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
DEADLINE = 200.0

WORKER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]).parent
me = f"{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"

def save(*_):
    (folder / f"asked-{me}").touch()
    while not (folder / "saved").exists():
        time.sleep(0.01)
    sys.exit(130)

for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
(folder / f".{me}").write_text(str(os.getpid()))
(folder / f".{me}").rename(folder / f"ran-{me}")
while not (folder / "code").exists():
    time.sleep(0.01)
sys.exit(int((folder / "code").read_text()))
"""


REUSABLE = """
import os, pathlib, sys, threading, time
from keepwarm.trainer.distributed.in_process_restart import ControlChannel, RestartRequested
folder = pathlib.Path(sys.argv[1]).parent
control = ControlChannel.inherited()
while True:
    me = f"{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    interrupted = threading.Event()
    try:
        with control.training(interrupted.set):
            (folder / f".{me}").write_text(str(os.getpid()))
            (folder / f".{me}").rename(folder / f"ran-{me}")
            while not (folder / "code").exists():
                if (folder / f"fail-{me}").exists():
                    sys.exit(1)
                if interrupted.wait(0.01):
                    raise RuntimeError("a collective failed")
            sys.exit(int((folder / "code").read_text()))
    except RestartRequested:
        pass
    control.park()
"""
"""A reusable worker that fails once the file `fail-<rank>-<restart>` exists."""


class StandIns:
    """Nodes that a program starts; it finds the folder in its first argument, and workers in the module `stand_in`."""

    def __init__(self, folder: Path, launcher: str, *arguments: str, worker: str = WORKER) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "stand_in.py").write_text(worker)
        command = [sys.executable, "-c", launcher, str(folder), *arguments]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}:{folder}"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def until(self, ready: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + DEADLINE
        while True:
            ended = self.process.poll() is not None  # before the last look
            if found := ready():
                return found
            assert time.monotonic() < end, f"waited {DEADLINE:g} s for {what}:\n{self.log.read_text()}"
            assert not ended, self.log.read_text()
            time.sleep(0.02)

    def end(self, code: int = 0) -> None:
        """Let all workers end with this code, which is then the run's."""
        (self.folder / ".code").write_text(str(code))
        (self.folder / ".code").rename(self.folder / "code")
        assert self.process.wait(DEADLINE) == code, self.log.read_text()

    def kill(self) -> None:
        """Kill what is left: the program and all that it has started, which have its environment."""
        mine = f":{self.folder}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mine in (process / "environ").read_bytes() + b"\0":
                    os.kill(int(process.name), signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pids: set[int]) -> None:
    deadline = time.monotonic() + DEADLINE
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} outlived the run"
        time.sleep(0.02)
