"""Runs on emulated nodes that lose parts of themselves, against one that does not: every loss and weight to the bit.

Faults come from outside, by SIGKILL to the pids that the supervisors wrote down, after steps that metrics.jsonl shows.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import events, node_record
from launch.node_record import NodeRecord
from tests.support.run_contents import steps_of, tensors_of

JOB = Path(__file__).parents[2] / "configs" / "ci" / "snapshot.yaml"
ROOT = JOB.parents[2]
DEADLINE = 280.0
STEPS = 30
OVERRIDES = (f"stages.0.tokens={STEPS * 512}", "log.tensorboard=false", "evaluation.samples=8")
pytestmark = [pytest.mark.timeout(900), pytest.mark.dist]


def command(folder: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-P", "-m", "launch.cli", "train", str(JOB), f"output={folder}", *OVERRIDES, *options,
    ]  # fmt: skip


class Run:
    """A run with its launcher, and the faults that are done to it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".out")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command(folder, *options), stdout=log, stderr=log, cwd=ROOT)
        self.pids: set[int] = set()

    def until(self, ready: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + DEADLINE
        while not (found := ready()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"waited {DEADLINE:g} s for {what}:\n{self.log.read_text()}"
            time.sleep(0.02)
        return found

    def after(self, step: int) -> None:
        def reached() -> bool:
            path = self.folder / "metrics.jsonl"
            return path.exists() and max((line["step"] for line in steps_of(self.folder)), default=0) >= step

        self.until(reached, f"step {step}")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in events.read(self.folder) if event["event"] == kind]

    def recovered(self, count: int) -> dict[str, Any]:
        return self.until(lambda: self.events("recovery")[count - 1 :], f"recovery {count}")[0]

    def owner(self, slot: int) -> NodeRecord:
        """The node that has a slot, once its supervisor knows its agent."""

        def found() -> list[NodeRecord]:
            records = [record for record in node_record.read_all(self.folder) if record.slot == slot]
            return [record for record in records if record.state == "running" and record.agent is not None]

        # A killed node cannot take its record back: the later generation has the slot.
        records: list[NodeRecord] = self.until(found, f"a node in slot {slot}")
        record = max(records, key=lambda each: each.generation)
        self.pids |= {record.supervisor, *record.workers.values()} | ({record.agent} if record.agent else set())
        return record

    def lose_node(self, slot: int, *, with_store: bool = False) -> None:
        record = self.owner(slot)
        victims = [record.supervisor, record.agent, *record.workers.values()]
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("nodes") / "whole"
    done = subprocess.run(command(folder, "--nodes", "4"), capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    runtime = tempfile.mkdtemp(prefix="kw-")  # short, as the paths of sockets must be
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    runs: list[Run] = []

    def begin(*options: str) -> Run:
        runs.append(Run(tmp_path / "run", *options))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.wait()
    shutil.rmtree(runtime)


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

    def lives(pid: int) -> bool:
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    while left := [pid for pid in pids if lives(pid)]:
        assert time.monotonic() < end, f"processes {left} outlived the run"
        time.sleep(0.05)
    assert list(Path(os.environ["XDG_RUNTIME_DIR"]).rglob("*.sock")) == []


@pytest.mark.ci
def test_the_first_node_is_lost_and_then_a_worker(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "--spares", "1")
    run.after(3)
    run.lose_node(0)
    first = run.recovered(1)
    assert (first["rung"], first["slots"], first["source"]) == (2, [0], "memory")
    assert set(first["phases"]) == set(events.PHASES)
    assert run.owner(0).node == "node-4"
    run.until(lambda: [event for event in run.events("whole") if event["slots"] == [0]], "redundancy to be back")

    os.kill(next(iter(run.owner(2).workers.values())), signal.SIGKILL)
    second = run.recovered(2)
    assert (second["rung"], second["slots"], second["source"]) == (1, [2], "memory")
    assert second["bytes_decoded"] == 0
    assert "SIGKILL" in second["why"]
    run.done()
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.long
def test_two_nodes_are_lost_at_once_and_the_store_with_one(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "--spares", "2")
    run.after(3)
    run.owner(3)
    run.lose_node(1, with_store=True)
    run.lose_node(3)
    run.recovered(1)
    run.after(8)
    assert {run.owner(slot).node for slot in (1, 3)} == {"node-4", "node-5"}
    assert [run.owner(slot).node for slot in (0, 2)] == ["node-0", "node-2"]
    run.done()
    assert all(event["source"] == "memory" for event in run.events("recovery"))
    assert_equal(run, whole)
    assert_nothing_left(run)


def kill_supervisor(run: Run) -> None:
    os.kill(run.owner(1).supervisor, signal.SIGKILL)


def kill_agent(run: Run) -> None:
    agent = run.owner(1).agent
    assert agent is not None
    os.kill(agent, signal.SIGKILL)


def kill_store(run: Run) -> None:
    store = node_record.newest_store(run.folder)
    assert store is not None
    os.kill(store.pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("fault", [kill_supervisor, kill_agent, kill_store])
def test_one_part_of_a_node_is_lost(whole: Path, start: Callable[..., Run], fault: Callable[[Run], None]) -> None:
    run = start("--nodes", "4", "--spares", "1")
    run.after(3)
    fault(run)
    run.done()
    failures = [event["kind"] for event in run.events("failure")]
    assert {kill_supervisor: "lost", kill_agent: "agent", kill_store: "store"}[fault] in failures
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.long
def test_a_frozen_node_is_fenced_when_it_wakes_up(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "--spares", "1", "snapshot.silence=2.0")
    run.after(3)
    record = run.owner(2)
    frozen = [record.supervisor, *([record.agent] if record.agent else []), *record.workers.values()]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    recovery = run.recovered(1)
    assert (recovery["rung"], recovery["slots"]) == (2, [2])
    assert recovery["phases"]["detect"] == 2.0
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    run.done()
    assert [record.slot for record in node_record.read_all(run.folder) if record.node == "node-4"] == [2]
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.long
def test_more_nodes_than_parity_are_lost(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "--spares", "3")
    run.after(12)
    for slot in (0, 1, 2):
        run.owner(slot)
    for slot in (0, 1, 2):
        run.lose_node(slot)
    recovery = run.recovered(1)
    assert recovery["rung"] == 3
    assert recovery["source"] in ("disk", "nothing")
    assert "needs 2 good chunks" in recovery["why"] or "no agent holds" in recovery["why"]
    run.done()
    assert_equal(run, whole)


def test_another_number_of_nodes_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path / "run", "--nodes", "3"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "the layout has 4 ranks" in done.stderr
    assert "give --nodes 4" in done.stderr
    assert not (tmp_path / "run").exists()
