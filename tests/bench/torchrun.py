"""Stock torchrun with emulated nodes: what `recovery` is compared with.

Set up as well as it can be: a rendezvous store that no node hosts, keep-alives of a second, at most one spare (with
more, healthy nodes are left out), workers that train `tests/bench/stock.py`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import TCPStore

from tests.bench.stock import STEPS

DEADLINE = 180.0
NODES, RANKS_PER_NODE = 4, 2
ROOT = Path(__file__).parents[2]


class Torchrun:
    """A run with its agents."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._agents: list[subprocess.Popen[bytes]] = []
        self.members = [self._agent() for _ in range(NODES)]
        self.step_after(0)

    def spare(self) -> subprocess.Popen[bytes]:
        """One more agent, which waits in the rendezvous when this returns."""
        agent = self._agent()
        log = self._log(len(self._agents) - 1)
        self._until(lambda: "Rendezvous'ing" in log.read_text(), "a spare to wait")
        return agent

    def lose_worker(self, index: int) -> float:
        """When a worker of an agent was killed, in seconds since 1970."""
        worker = psutil.Process(self.members[index].pid).children()[0]
        now = time.time()
        worker.kill()
        return now

    def lose_node(self, index: int, spare: subprocess.Popen[bytes]) -> float:
        """When an agent with its workers was killed; `spare` is a member from then on."""
        agent = self.members[index]
        victims = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
        now = time.time()
        for victim in victims:
            victim.kill()
        agent.wait()
        self.members[index] = spare
        return now

    def step_after(self, moment: float) -> dict[str, Any]:
        """The first step that processes completed which had not completed one before `moment`."""

        def found() -> dict[str, Any] | None:
            lines = self._steps()
            before = {line["pid"] for line in lines if line["time"] <= moment}
            return next((line for line in lines if line["pid"] not in before), None)

        return self._until(found, "the next step")

    def steps(self, count: int) -> None:
        """Wait for so many further steps."""
        wanted = len(self._steps()) + count
        self._until(lambda: len(self._steps()) >= wanted, f"{count} steps")

    def close(self) -> None:
        for agent in self._agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGTERM)
        for agent in self._agents:
            with contextlib.suppress(psutil.Error):
                for worker in psutil.Process(agent.pid).children(recursive=True):
                    worker.kill()
            agent.kill()
            agent.wait()

    def _agent(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO",
            "PYTHONPATH": str(ROOT / "src"), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        command = [
            sys.executable, "-P", "-m", "torch.distributed.run", f"--nnodes={NODES}:{NODES}",
            f"--nproc-per-node={RANKS_PER_NODE}", "--rdzv-backend=c10d", "--rdzv-id=stock",
            f"--rdzv-endpoint=127.0.0.1:{self._store.port}",
            "--rdzv-conf=is_host=0,keep_alive_interval=1,keep_alive_max_attempt=3", "--max-restarts=1000",
            "--local-addr=127.0.0.1", str(ROOT / "tests" / "bench" / "stock.py"), str(self._folder),
        ]  # fmt: skip
        with self._log(len(self._agents)).open("wb") as log:
            agent = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        self._agents.append(agent)
        return agent

    def _log(self, index: int) -> Path:
        return self._folder / f"agent_{index}.log"

    def _steps(self) -> list[dict[str, Any]]:
        path = self._folder / STEPS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _until(self, ready: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + DEADLINE
        while not (found := ready()):
            if time.monotonic() > end:
                raise TimeoutError(f"torchrun: waited {DEADLINE:g} s for {what}; logs in {self._folder}")
            time.sleep(0.05)
        return found


@contextlib.contextmanager
def torchrun(folder: Path) -> Iterator[Torchrun]:
    """One run; all its processes are killed in the end."""
    with contextlib.closing(Torchrun(folder)) as run:
        yield run


def recoveries(folder: Path, what: str, rounds: int) -> list[float]:
    """Seconds from the kill of a worker or a node to the end of the next step."""
    totals = []
    with torchrun(folder) as run:
        for count in range(rounds):
            spare = run.spare() if what == "node" else None
            run.steps(3)
            index = count % NODES
            killed = run.lose_worker(index) if spare is None else run.lose_node(index, spare)
            totals.append(run.step_after(killed)["time"] - killed)
    return totals
