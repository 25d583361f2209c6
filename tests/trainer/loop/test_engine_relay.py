"""A job that is handed from engine to engine as real processes, through durable checkpoints and other layouts."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from tests.support.runs import warm
from tests.support.runs.run_contents import steps_of
from tests.trainer.loop.test_run import DEADLINE, TINY

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install 'keepwarm[deepspeed]'",
    ),
    pytest.mark.dist,
    pytest.mark.long,
    pytest.mark.timeout(1800),
]

LEGS = (
    ("torch", 1, 1, 2),
    ("megatron", 2, 2, 1),
    ("deepspeed", 1, 2, 2),
    ("torch", 2, 1, 1),
)
"""Engine, and ranks on the tensor, pipeline and data axis."""
STEPS = 10
TOKENS_PER_STEP = 8 * 64
# A rate that does not depend on where the run is going to end; micro-batches of a size that every layout can run.
JOB = ("stages.0.lr={schedule: constant, max: 1e-3, warmup: 0}", "batch.micro_batch_size=2", "log.tensorboard=false")


def train(*arguments: str) -> None:
    done = warm.run(["train", *arguments], timeout=DEADLINE)
    assert done.returncode == 0, done.stdout


def until(step: int) -> str:
    return f"stages.0.tokens={step * TOKENS_PER_STEP}"


def trained(folder: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in steps_of(folder) if "loss" in line}


def ledger_of(folder: Path) -> dict[str, Any]:
    newest = publication.latest(folder / "checkpoints")
    assert newest is not None
    ledger: dict[str, Any] = read_manifest(newest).meta["ledger"]
    return ledger


def test_run_through_every_engine_and_back_continues(tmp_path: Path) -> None:
    alone, relay = tmp_path / "alone", tmp_path / "relay"
    end = STEPS * len(LEGS)
    train(str(TINY), f"output={alone}", until(end), *JOB)
    for number, (engine, tensor, pipeline, data) in enumerate(LEGS):
        began = (str(relay), "--resume") if number else (str(TINY), f"output={relay}", *JOB)
        layout = f"parallel={{engine: {engine}, tensor: {tensor}, pipeline: {pipeline}, data: {data}}}"
        train(*began, layout, until(STEPS * (number + 1)))

    expected, found = trained(alone), trained(relay)
    assert list(found) == list(expected) == list(range(1, end + 1))
    for step, line in expected.items():
        assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-6), step
        assert found[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5), step
        assert (found[step]["tokens"], found[step]["lr"]) == (line["tokens"], line["lr"]), step
    assert ledger_of(relay) == ledger_of(alone)
