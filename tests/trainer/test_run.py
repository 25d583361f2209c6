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


@pytest.mark.dist
@pytest.mark.ci
def test_interrupted_and_resumed_equals_torchrun_uninterrupted(tmp_path: Path) -> None:
    layout = ["parallel.data=2", "profile={start: 1, steps: 1}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, "-m", "trainer", str(TINY), f"output={whole}", *layout])
    assert done.returncode == 0, done.stderr

    command = keepwarm(str(TINY), f"output={parts}", *layout)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TINY.parents[2]
    ) as process:
        try:
            wait_for_step(parts, 3, process)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    assert process.returncode == 130, output
    stopped_at = steps_of(parts)[-1]["step"]
    assert 3 <= stopped_at < 20
    refused = run(command)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = run([*command, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr

    assert steps_of(parts) == steps_of(whole)
    assert tensors_of(parts) == tensors_of(whole)
    assert sorted(path.name for path in (whole / "profile").iterdir()) == ["trace_00000.json", "trace_00001.json"]


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
