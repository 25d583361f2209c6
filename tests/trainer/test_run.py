"""Whole runs of the tiny job as real processes: stopped and continued, started by one launcher or another."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from ft import durable

TINY = Path(__file__).parents[2] / "configs" / "ci" / "tiny.yaml"
DEADLINE = 280.0
pytestmark = pytest.mark.timeout(600)


def keepwarm(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "launch.cli", "train", *arguments]


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=TINY.parents[2])


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without the times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "step_time_s"} for line in lines]


def tensors_of(folder: Path) -> dict[tuple[str, tuple[int, ...]], str]:
    """Checksum of every stored piece of the newest checkpoint, after all bytes were verified against them."""
    newest = durable.latest(folder / "checkpoints")
    assert newest is not None
    manifest = durable.verify(newest)
    return {(entry.piece.name, entry.piece.offsets): entry.xxh3 for part in manifest.parts for entry in part.entries}


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (folder / "metrics.jsonl").exists() and max((line["step"] for line in steps_of(folder)), default=0) >= step:
            return
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
    done = run(torchrun("-m", "trainer", str(TINY), f"output={folder}", *TWO_RANKS, profile))
    assert done.returncode == 0, done.stderr
    return folder


def disturbed(command: list[str], folder: Path, number: signal.Signals, *, rank: int | None) -> tuple[int, str]:
    """Run a command and send a signal after its third step, to itself or to one of its ranks; (exit code, output)."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TINY.parents[2]
    ) as process:
        try:
            wait_for_step(folder, 3, process)
            os.kill(process.pid if rank is None else rank_of(process.pid, rank), number)
            output, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    return process.returncode, output


def rank_of(launcher: int, rank: int) -> int:
    """The pid of a rank among a launcher's children."""
    for child in psutil.Process(launcher).children():
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"no rank {rank} among the children of {launcher}")


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def assert_no_agents(folder: Path) -> None:
    """Every agent that the run started has ended, or does so now that its job has."""
    started = [
        json.loads(line)["pid"]
        for log in (folder / "agents").glob("agent-*.log")
        for line in log.read_text().splitlines()
        if '"pid"' in line and '"started"' in line
    ]
    assert started
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in started):
        assert time.monotonic() < deadline, "an agent outlived its job"
        time.sleep(0.05)


@pytest.mark.dist
@pytest.mark.ci
def test_interrupted_and_resumed_equals_torchrun_uninterrupted(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    command = keepwarm(str(TINY), f"output={parts}", *TWO_RANKS)
    code, output = disturbed(command, parts, signal.SIGINT, rank=None)
    assert code == 130, output
    assert 3 <= steps_of(parts)[-1]["step"] < 20
    refused = run(command)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = run([*command, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr

    assert steps_of(parts) == steps_of(whole)
    assert tensors_of(parts) == tensors_of(whole)
    assert sorted(path.name for path in (whole / "profile").iterdir()) == ["trace_00000.json", "trace_00001.json"]


@pytest.mark.dist
@pytest.mark.ci
@pytest.mark.parametrize("launcher", ["keepwarm", "torchrun"])
def test_a_killed_worker_is_restarted_from_memory(whole: Path, tmp_path: Path, launcher: str) -> None:
    folder = tmp_path / "killed"
    job = [str(TINY), f"output={folder}", *TWO_RANKS, IN_MEMORY]
    command = keepwarm(*job) if launcher == "keepwarm" else torchrun("--max-restarts", "1", "-m", "trainer", *job)
    code, output = disturbed(command, folder, signal.SIGKILL, rank=1)
    assert code == 0, output
    began = [event for event in events_of(folder) if event["event"] == "began"]
    assert [event["source"] for event in began] == ["nothing", "memory"]
    assert began[1]["step"] >= 1  # with a snapshot every step at most two are lost, and three were completed
    assert steps_of(folder) == steps_of(whole)
    assert tensors_of(folder) == tensors_of(whole)
    assert_no_agents(folder)


@pytest.mark.ci
def test_a_run_that_is_not_finite_stops_itself(tmp_path: Path) -> None:
    output = tmp_path / "run"
    rate = "stages.0.lr={schedule: constant, max: 1e30, warmup: 0.0}"
    done = run(keepwarm(str(TINY), f"output={output}", rate, "optimizer.name=sgd", "health.max_skipped=3"))
    assert done.returncode == 3, done.stderr
    assert "3 steps in a row were not finite" in done.stderr
    assert "rank 0" in done.stderr
    assert "Traceback" not in done.stderr
    events = [json.loads(line)["event"] for line in (output / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "stop"
    assert all(line["loss"] is None or math.isfinite(line["loss"]) for line in steps_of(output) if "loss" in line)


@pytest.mark.ci
def test_a_world_that_is_not_the_layouts_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    command = [sys.executable, "-P", "-m", "trainer", str(TINY), f"output={tmp_path / 'run'}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, cwd=TINY.parents[2], env=environment
    )
    assert done.returncode == 2
    assert "the layout has 1 ranks" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
