"""An engine of another distribution: planned and trained with, without a change to keepwarm."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import outside_engine

ROOT = Path(__file__).parents[2]
STEP = 8 * 64
"""Tokens of one step of the job."""

Keepwarm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def keepwarm(tmp_path: Path) -> Keepwarm:
    """The command, where the engine `scaled` is installed, and one that cannot be imported."""
    folder = tmp_path / "site"
    outside_engine.install(folder)
    broken = folder / "broken_engine-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-engine\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[keepwarm.engines]\nbroken = no_such_module:Info\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}/src", "COLUMNS": "200"}
        command = [sys.executable, "-m", "keepwarm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)

    return run


def test_foreign_engine_is_planned_and_trained_with(keepwarm: Keepwarm, tmp_path: Path) -> None:
    job = ["ci/tiny", f"stages.0.tokens={3 * STEP}", "log.tensorboard=false", "parallel.data=2"]
    scaled = ["parallel.engine=scaled", "parallel.options.lr_factor=0.5", "stages.0.lr={schedule: constant, max: 2e-3}"]
    planned = [keepwarm("plan", *job, *engine, "--json") for engine in ([], scaled)]
    assert [one.returncode for one in planned] == [0, 0], planned
    ours, theirs = (json.loads(one.stdout)["ranks"] for one in planned)
    assert ours == theirs

    trained = keepwarm("train", *job, *scaled, f"output={tmp_path / 'scaled'}")
    assert trained.returncode == 0, trained.stderr
    assert keepwarm("train", *job, "stages.0.lr={schedule: constant, max: 1e-3}", "output=plain").returncode == 0
    resolved = json.loads((tmp_path / "scaled/run.json").read_text())["parallel"]
    assert (resolved["engine"], resolved["options"]) == ("scaled", {"lr_factor": 0.5})
    losses = losses_of(tmp_path / "scaled")
    assert len(losses) == 3
    assert losses == losses_of(tmp_path / "plain")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.options.lr_facto=2"], "lr_facto: unknown key; did you mean parallel.options.lr_factor?"),
        (["parallel.options.lr_factor=-1"], "parallel.options.lr_factor: expected greater than 0, got -1"),
        (["parallel.engine=torch", "parallel.options.lr_factor=2"], "it belongs to parallel.engine = scaled"),
        (["parallel.options.lr_factor=2", "parallel.pipeline=2"], "parallel.engine = scaled: parallel.options.lr_fac"),
        (["parallel.engine=scale"], "did you mean 'scaled'? there are: torch, megatron, deepspeed, "),
        (["parallel.engine=broken"], "engine 'broken' of the package broken-engine cannot be loaded: No module named"),
    ],
)
def test_foreign_engine_wrong_option_is_refused(keepwarm: Keepwarm, overrides: list[str], said: str) -> None:
    refused = keepwarm("plan", "ci/tiny", "parallel.engine=scaled", *overrides)
    assert refused.returncode == 2
    assert said in refused.stderr


def test_foreign_engine_is_listed_by_doctor(keepwarm: Keepwarm) -> None:
    found = {one["name"]: one for one in json.loads(keepwarm("doctor", "--json").stdout) if one["kind"] == "engine"}
    assert found["scaled"] == {"kind": "engine", "name": "scaled", "usable": True, "detail": "scaled-engine 1.0"}
    assert not found["broken"]["usable"]
    assert "cannot be loaded: No module named 'no_such_module'" in found["broken"]["detail"]


def losses_of(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
