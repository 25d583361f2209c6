"""Start keepwarm without imports: forked, as its workers are, from a process that has torch and the trainer.

Importing takes most of the time of a tiny run. What starts here is otherwise the same as `python -P -m keepwarm`: a
process and session of its own, with its own signals, ended by the kernel with the process of the tests. Tests of the
start itself, and those by torchrun, mpirun and SLURM, start interpreters.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from keepwarm.launch.forkserver import PRELOADED, ForkServer, Worker

ROOT = Path(__file__).parents[3]
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
"""From before any test has changed it."""
_MODULES = (
    *PRELOADED,
    "typer",
    "rich.console",
    "keepwarm.launch.local.train",
    "keepwarm.launch.local.nodes",
    "keepwarm.launch.node.supervisor",
)
_PROGRAM = f"""
import os, socket, sys
from keepwarm.launch.forkserver import ForkServerProcess
ForkServerProcess(socket.socket(fileno=int(sys.argv[1])), os.getppid()).run({_MODULES})
"""


class _ForkServer(ForkServer):
    """A fork server in an interpreter of its own: the process of the tests has threads, and has computed."""

    def _launch(self, modules: Sequence[str], environment: Mapping[str, str]) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=dict(environment),
                cwd=ROOT,
            )
        return ours, self._process.pid

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


@cache
def _server(preload: str) -> _ForkServer:
    server = _ForkServer(environment=_ENVIRONMENT | ({"LD_PRELOAD": preload} if preload else {}))
    atexit.register(server.close)
    return server


class Process:
    """A started command, as `subprocess.Popen` has it; its output lies in a file."""

    def __init__(self, arguments: Sequence[str], log: Path, *, preload: Path | None = None) -> None:
        """`preload`: a library for it and everything that it starts."""
        self.log = log
        self._server = _server("" if preload is None else str(preload))
        log.write_bytes(b"")
        changed = {name: value for name, value in os.environ.items() if _ENVIRONMENT.get(name) != value}
        worker = Worker(module="keepwarm", arguments=tuple(arguments), environment=changed, log=str(log))
        self.pid = self._server.start(worker)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        self._server.poll()
        return self._server.ended.get(self.pid)

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if (left := end - time.monotonic()) <= 0:
                self.kill()
                raise TimeoutError(f"process {self.pid} has not ended in {timeout:g} s:\n{self.output}")
            self._server.poll(left)
        return code

    def send_signal(self, number: int) -> None:
        self._server.send([self.pid], signal.Signals(number))

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(arguments: Sequence[str], *, timeout: float) -> subprocess.CompletedProcess[str]:
    """`keepwarm ARGUMENTS`; what it wrote to stdout and stderr, in one, is the result's `stdout`."""
    with tempfile.TemporaryDirectory(prefix="keepwarm-warm-") as folder:
        process = Process(arguments, Path(folder) / "log")
        code = process.wait(timeout)
        return subprocess.CompletedProcess(list(arguments), code, process.output, "")
