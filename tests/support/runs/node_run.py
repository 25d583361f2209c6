"""A run of the small job on emulated nodes, and the faults that are done to it from outside.

Faults come by SIGKILL to the pids that the supervisors wrote down, after steps that metrics.jsonl shows.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keepwarm.launch.node import record as node_record
from keepwarm.launch.node.record import NodeRecord
from keepwarm.trainer.monitor import events
from tests.support.runs import warm
from tests.support.runs.run_contents import steps_of, tensors_of
from tests.support.runs.stand_ins import alive

JOB = Path(__file__).parents[3] / "configs" / "ci" / "snapshot.yaml"
ROOT = JOB.parents[2]
DEADLINE = 280.0
STEPS = 30
OVERRIDES = (f"stages.0.tokens={STEPS * 512}", "log.tensorboard=false", "evaluation.samples=8")


def command(folder: Path, *options: str, job: Path = JOB) -> list[str]:
    """What `keepwarm` is told."""
    return ["train", str(job), f"output={folder}", *OVERRIDES, *options]


class Run:
    """A run with its launcher, and the faults that are done to it."""

    def __init__(self, folder: Path, *options: str, job: Path = JOB, cold: bool = False) -> None:
        """`cold` starts an interpreter, which imports under the environment of now."""
        arguments = command(folder, *options, job=job)
        self.folder = folder
        self.log = folder.with_suffix(".out")
        self.process: warm.Process | subprocess.Popen[bytes]
        if cold:
            interpreter = [sys.executable, "-P", "-m", "keepwarm"]
            with self.log.open("wb") as log:
                self.process = subprocess.Popen([*interpreter, *arguments], stdout=log, stderr=log, cwd=ROOT)
        else:
            self.process = warm.Process(arguments, self.log)
        self.pids: set[int] = set()

    def until(self, ready: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + DEADLINE
        while True:
            ended = self.process.poll() is not None  # before the last look
            if found := ready():
                return found
            assert not ended, self.log.read_text()
            assert time.monotonic() < end, f"waited {DEADLINE:g} s for {what}:\n{self.log.read_text()}"
            time.sleep(0.02)

    def after(self, step: int) -> None:
        self.until(lambda: self.newest() >= step, f"step {step}")

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = events.read(self.folder).of(events.KINDS[kind])
        return [json.loads(msgspec.json.encode(event)) for event in found]

    def recovered(self, count: int) -> dict[str, Any]:
        return self.until(lambda: self.events("recovery")[count - 1 :], f"recovery {count}")[0]

    def owner(self, slot: int) -> NodeRecord:
        """The node that has a slot, once its supervisor knows its agent."""

        def found() -> NodeRecord | None:
            records = [record for record in node_record.read_all(self.folder) if record.slot == slot]
            # A killed node cannot take its record back: the later restart counts.
            newest = max(records, key=lambda each: each.restart, default=None)
            ready = newest is not None and newest.state == "running" and None not in (newest.agent, newest.keeper)
            return newest if ready else None

        record: NodeRecord = self.until(found, f"a node in slot {slot}")
        self.pids |= {pid for pid in (record.supervisor, record.keeper, record.agent) if pid is not None}
        self.pids |= {*record.workers.values()}
        return record

    def newest(self) -> int:
        """The last step that metrics.jsonl shows."""
        path = self.folder / "metrics.jsonl"
        return max((line["step"] for line in steps_of(self.folder)), default=0) if path.exists() else 0

    def lose_agents(self, slots: Collection[int]) -> None:
        """The agents of these slots, and with their keepers all that they hold."""
        keepers = [self.owner(slot).keeper for slot in slots]
        for keeper in keepers:
            assert keeper is not None
            os.kill(keeper, signal.SIGKILL)

    def crash_agents(self, slots: Collection[int]) -> None:
        """The agents of these slots, and nothing that they hold."""
        agents = [self.owner(slot).agent for slot in slots]
        for agent in agents:
            assert agent is not None
            os.kill(agent, signal.SIGKILL)

    def settled(self, slot: int) -> int:
        """The step that all agents have committed once a worker of `slot` stands still, and no more is under way."""

        def at_rest() -> int | None:
            ask = [sys.executable, "-P", "-m", "keepwarm", "snapshots", str(self.folder), "--json"]
            said = subprocess.run(ask, capture_output=True, text=True, cwd=ROOT, timeout=60)
            answer = json.loads(said.stdout) if said.returncode == 0 else {"agents": [], "silent": {}}
            agents = answer["agents"]
            if not agents or answer["silent"]:
                return None
            still = any(held["phase"] in ("sealed", "prepared") for held in agents[slot]["held"])
            steps = {agent["committed"][1] for agent in agents}
            return None if still or len(steps) > 1 else int(steps.pop())

        self.until(at_rest, "all agents to have committed what they can")
        # By now its agent has read what its workers had sent before.
        step: int = self.until(at_rest, "all agents to have committed what they can")
        return step

    def lose_worker(self, rank: int, ranks_per_node: int = 1) -> None:
        os.kill(self.owner(rank // ranks_per_node).workers[rank], signal.SIGKILL)

    def lose_node(self, slot: int, *, with_store: bool = False) -> None:
        record = self.owner(slot)
        victims = [record.keeper, record.supervisor, *record.workers.values()]
        if with_store:
            store = node_record.newest_store(self.folder)
            assert store is not None
            victims.append(store.pid)
        for pid in victims:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

    def done(self) -> None:
        code = self.process.wait(DEADLINE)
        assert code == 0, self.log.read_text()


@contextlib.contextmanager
def runs(folder: Path, job: Path = JOB) -> Iterator[Callable[..., Run]]:
    """Starts `folder / "run"` with the options it is called with; the launcher is killed in the end."""
    runtime = tempfile.mkdtemp(prefix="kw-")  # short, as the paths of sockets must be
    begun: list[Run] = []

    def begin(*options: str, cold: bool = False) -> Run:
        begun.append(Run(folder / "run", *options, job=job, cold=cold))
        return begun[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", runtime)
        try:
            yield begin
        finally:
            for run in begun:
                run.process.kill()
                run.process.wait(DEADLINE)
            shutil.rmtree(runtime, ignore_errors=True)  # agents may be removing what is theirs


def assert_equal(run: Run, whole: Path) -> None:
    assert steps_of(run.folder) == steps_of(whole)
    assert tensors_of(run.folder) == tensors_of(whole)


def assert_nothing_left(run: Run) -> None:
    """No process of the run, and no folder of an agent."""
    store = node_record.newest_store(run.folder)
    assert store is not None
    records = node_record.read_all(run.folder)
    pids = run.pids | {store.pid} | {record.supervisor for record in records}
    end = time.monotonic() + 60

    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < end, f"processes {left} outlived the run"
        time.sleep(0.05)
    assert list(Path(os.environ["XDG_RUNTIME_DIR"]).rglob("*.sock")) == []
