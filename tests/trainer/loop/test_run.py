"""Whole runs of the tiny job as real processes: stopped and continued, started by one launcher or another."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from tests.support.corpus import write_token_file
from tests.support.runs import warm
from tests.support.runs.run_contents import steps_of, tensors_of
from tests.support.runs.stand_ins import alive

TINY = Path(__file__).parents[3] / "configs" / "ci" / "tiny.yaml"
DEADLINE = 280.0
pytestmark = pytest.mark.timeout(600)


Process = warm.Process | subprocess.Popen[bytes]


def keepwarm(*arguments: str) -> list[str]:
    return ["keepwarm", "train", *arguments]


@contextlib.contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[Process]:
    """A process whose output goes to a file, and which does not outlive its test."""
    process: Process
    if command[0] == "keepwarm":
        process = warm.Process(command[1:], log)
    else:
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=TINY.parents[2])
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=DEADLINE)


def run(command: Sequence[str], log: Path) -> tuple[int, str]:
    """(exit code, output) of a whole run."""
    with started(command, log) as process:
        code = process.wait(timeout=DEADLINE)
    return code, log.read_text()


def wait_for_step(folder: Path, step: int, process: Process, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        ended = process.poll() is not None  # before the last look
        if (folder / "metrics.jsonl").exists() and max((line["step"] for line in steps_of(folder)), default=0) >= step:
            return
        assert not ended, log.read_text()
        time.sleep(0.05)
    pytest.fail(f"step {step} did not come within {DEADLINE} s")


TWO_RANKS = ("parallel.data=2", "cluster.ranks_per_node=1")
IN_MEMORY = "snapshot={every: 1}"


def torchrun(*arguments: str) -> list[str]:
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, *arguments]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two ranks under torchrun, never interrupted, with a profile of its second step."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    profile = "profile={start: 1, steps: 1}"
    command = torchrun("-m", "keepwarm.trainer", str(TINY), f"output={folder}", *TWO_RANKS, profile)
    code, output = run(command, folder.with_suffix(".out"))
    assert code == 0, output
    return folder


def disturbed(
    command: list[str], folder: Path, number: signal.Signals, victim: Callable[[int], int]
) -> tuple[int, str]:
    """Run a command and signal a victim, found by the command's pid, after the fifth step; (exit code, output).

    The watchdog knows the time of three steps by then.
    """
    log = folder.with_suffix(".out")
    with started(command, log) as process:
        wait_for_step(folder, 5, process, log)
        os.kill(victim(process.pid), number)
        code = process.wait(timeout=DEADLINE)
    return code, log.read_text()


def rank_1_of(launcher: int) -> int:
    """The pid of rank 1 among the processes that a launcher has started: who writes its log, or was told its rank."""
    return next(
        child.pid
        for child in psutil.Process(launcher).children(recursive=True)
        if child.environ().get("RANK") == "1" or any("rank_00001.log" in file.path for file in child.open_files())
    )


def agent_lives(folder: Path, slot: int | str = "*", who: str = "pid") -> list[int]:
    """Pids of the agents that were started (or of each one's `keeper`), oldest first for one slot."""
    return [
        line[who]
        for log in (folder / "agents").glob(f"agent-{slot}.log")
        for line in map(json.loads, log.read_text().splitlines())
        if line["text"] == "started"
    ]


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def assert_no_agents(folder: Path) -> None:
    """Every agent that the run started has ended, or does so now that its job has, and so has its keeper."""
    started = [*agent_lives(folder), *agent_lives(folder, who="keeper")]
    assert started
    deadline = time.monotonic() + 30
    while any(map(alive, started)):
        assert time.monotonic() < deadline, "an agent outlived its job"
        time.sleep(0.05)


@pytest.mark.dist
@pytest.mark.ci
def test_run_interrupted_and_resumed_equals_torchrun_uninterrupted(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    command = keepwarm(str(TINY), f"output={parts}", *TWO_RANKS)
    code, output = disturbed(command, parts, signal.SIGINT, lambda pid: pid)
    assert code == 130, output
    assert 3 <= steps_of(parts)[-1]["step"] < 20
    code, output = run(command, tmp_path / "refused.out")
    assert code == 2
    assert "--resume" in output
    code, output = run([*command, "--resume"], tmp_path / "resumed.out")
    assert code == 0, output

    assert steps_of(parts) == steps_of(whole)
    assert tensors_of(parts) == tensors_of(whole)
    assert sorted(path.name for path in (whole / "profile").iterdir()) == ["trace_00000.json", "trace_00001.json"]


@pytest.mark.dist
@pytest.mark.ci
@pytest.mark.parametrize("launcher", ["keepwarm", "torchrun"])
def test_run_killed_worker_restarts_from_memory(whole: Path, tmp_path: Path, launcher: str) -> None:
    folder = tmp_path / "killed"
    job = [str(TINY), f"output={folder}", *TWO_RANKS, IN_MEMORY]
    command = (
        keepwarm(*job) if launcher == "keepwarm" else torchrun("--max-restarts", "1", "-m", "keepwarm.trainer", *job)
    )
    code, output = disturbed(command, folder, signal.SIGKILL, rank_1_of)
    assert code == 0, output
    began = [event for event in events_of(folder) if event["event"] == "began"]
    assert [event["source"] for event in began] == ["nothing", "memory"]
    assert began[1]["step"] >= 1  # with a snapshot every step at most two are lost, and three were completed
    assert steps_of(folder) == steps_of(whole)
    assert tensors_of(folder) == tensors_of(whole)
    assert_no_agents(folder)


@pytest.mark.dist
@pytest.mark.ci
@pytest.mark.parametrize("who", ["pid", "keeper"])
def test_run_killed_agent_is_replaced_during_training(whole: Path, tmp_path: Path, who: str) -> None:
    folder = tmp_path / "killed"
    command = keepwarm(str(TINY), f"output={folder}", *TWO_RANKS, "snapshot={every: 1, commit_deadline: 30.0}")
    code, output = disturbed(command, folder, signal.SIGKILL, lambda _: agent_lives(folder, 1, who)[0])
    assert code == 0, output
    assert [event["event"] for event in events_of(folder)].count("began") == 1
    assert len(agent_lives(folder, 1)) == 2
    commits = [json.loads(line) for line in (folder / "agents" / "agent-1.log").read_text().splitlines()]
    assert any(line["text"] == "committed" and line["epoch"] > 1 for line in commits)
    assert len(set(agent_lives(folder, 1, "keeper"))) == {"pid": 1, "keeper": 2}[who]
    assert ("an agent of this slot has died: its memory is used on" in [line["text"] for line in commits]) == (
        who == "pid"
    )
    assert steps_of(folder) == steps_of(whole)
    assert tensors_of(folder) == tensors_of(whole)
    assert_no_agents(folder)


@pytest.mark.dist
@pytest.mark.ci
def test_run_frozen_rank_is_named_and_replaced(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frozen"
    command = keepwarm(str(TINY), f"output={folder}", *TWO_RANKS, IN_MEMORY, "health.min_hang_timeout=8.0")
    code, output = disturbed(command, folder, signal.SIGSTOP, rank_1_of)
    assert code == 0, output
    (hang,) = [event for event in events_of(folder) if event["event"] == "hang"]
    assert (hang["silent"], hang["late"]) == ([1], [])
    assert re.search(r"rank 1 did not answer.*; rank 0 in gloo:\w+ number \d+ of group ", hang["reason"])
    (report,) = Path(hang["reports"]).glob("rank_*.json")
    assert "most recent call first" in json.loads(report.read_text())["stacks"]
    began = [event for event in events_of(folder) if event["event"] == "began"]
    assert [event["source"] for event in began] == ["nothing", "memory"]
    assert steps_of(folder) == steps_of(whole)
    assert tensors_of(folder) == tensors_of(whole)
    assert_no_agents(folder)


@pytest.mark.ci
def test_run_non_finite_loss_stops_itself(tmp_path: Path) -> None:
    output = tmp_path / "run"
    rate = "stages.0.lr={schedule: constant, max: 1e30, warmup: 0.0}"
    command = keepwarm(str(TINY), f"output={output}", rate, "optimizer.name=sgd", "health.max_skipped=3")
    code, said = run(command, tmp_path / "run.out")
    assert code == 3, said
    assert "3 consecutive steps were not finite" in said
    assert "rank 0" in said
    assert "Traceback" not in said
    events = [json.loads(line)["event"] for line in (output / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "stopped"
    assert all(line["loss"] is None or math.isfinite(line["loss"]) for line in steps_of(output) if "loss" in line)


def test_run_batches_without_targets_are_skipped_and_counted(tmp_path: Path) -> None:
    """Documents of one token: every target belongs to the next document."""
    prefix, other = (write_token_file(tmp_path / str(token), [[token]] * 2000) for token in (7, 8))
    output, data = tmp_path / "run", f"data.sources={{en: {prefix}, de: {other}}}"
    masked = (str(TINY), f"output={output}", data, "data.document_mask=true")
    code, said = run(keepwarm(*masked, "data.validation={}", "health.max_skipped=3"), tmp_path / "run.out")
    assert code == 0, said
    assert "iteration 20 skipped: every target of its batch is masked (20 such steps)" in said
    assert {line["loss"] for line in steps_of(output) if "loss" in line} == {None}
    assert [event["event"] for event in events_of(output)].count("empty") == 20
    assert "stopped" not in {event["event"] for event in events_of(output)}
    code, said = run(keepwarm(*masked, f"data.validation={{en: {prefix}}}", "--force"), tmp_path / "validated.out")
    assert code == 2, said
    assert "data.validation.en: every target of its first samples is masked" in said
    assert "Traceback" not in said


@pytest.mark.ci
def test_run_world_size_other_than_layout_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    command = [sys.executable, "-P", "-m", "keepwarm.trainer", str(TINY), f"output={tmp_path / 'run'}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, cwd=TINY.parents[2], env=environment
    )
    assert done.returncode == 2
    assert "the layout has 1 ranks" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
@pytest.mark.ci
def test_run_resumed_without_snapshots_keeps_its_new_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    root = folder / "checkpoints"
    saving = ("checkpoint.every=1", "checkpoint.keep=2")

    def train(*arguments: str) -> list[tuple[int, int]]:
        """(epoch, step) of what is on disk afterwards."""
        code, output = run(keepwarm(*arguments, *saving), tmp_path / "log")
        assert code == 0, output
        return [(read_manifest(path).epoch, read_manifest(path).step) for path in publication.checkpoints(root)]

    first = train(str(TINY), f"output={folder}", IN_MEMORY, "stages.0.tokens=1024")
    assert first in ([(1, 1), (1, 2)], [(2, 1), (2, 2)])
    epoch = first[0][0]
    assert train(str(folder), "--resume", "snapshot=off", "stages.0.tokens=2048") == [(epoch + 1, 3), (epoch + 1, 4)]
    assert (root / "latest").read_text() == "iter_0000004\n"
    shutil.rmtree(folder / "agents")
    third = train(str(folder), "--resume", IN_MEMORY, "stages.0.tokens=3072")
    assert [step for _, step in third] == [5, 6]
    assert min(third)[0] > epoch + 1
