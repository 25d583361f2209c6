"""A learning-rate curve of another distribution: planned, trained and branched from without a change to keepwarm."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STEP = 8 * 64
"""Tokens of one step of the job."""

STAIRS = """
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from keepwarm.trainer.job.curve import AnnealableCurve, LrSpec


class StairsSpec(LrSpec):
    landing: float = Field(0.5, gt=0, lt=1, description="fraction of the stage at which the rate is halved for good")

    def curve(self, steps: int) -> "Stairs":
        return Stairs(kind=self.schedule, peak=self.max, landing=int(self.landing * steps), end=steps)


@dataclass(frozen=True, kw_only=True)
class Stairs(AnnealableCurve):
    Options = StairsSpec
    peak: float
    landing: int

    @property
    def boundaries(self) -> tuple[int, ...]:
        return (self.landing,)

    @property
    def constant_phase(self) -> range:
        return range(self.landing, self.end + 1)

    def anneal(self) -> dict[str, Any]:
        return {"schedule": "linear", "max": self.peak / 2, "min": self.peak / 8, "warmup": 0.0}

    def at(self, step: int) -> float:
        return self.peak if step < self.landing else self.peak / 2
"""

Keepwarm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def keepwarm(tmp_path: Path) -> Keepwarm:
    """The command, where a distribution with the curve `stairs` and one with a broken curve are installed."""
    folder = tmp_path / "site"
    for name, point in {"stairs": "stairs_of_others:Stairs", "broken": "no_such_module:Curve"}.items():
        metadata = folder / f"{name}_curve-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-curve\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[keepwarm.curves]\n{name} = {point}\n")
    (folder / "stairs_of_others.py").write_text(STAIRS)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}/src", "COLUMNS": "200"}
        command = [sys.executable, "-m", "keepwarm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)

    return run


def test_foreign_curve_is_planned_trained_and_branched_from(keepwarm: Keepwarm, tmp_path: Path) -> None:
    overrides = ["stages.0.lr={schedule: stairs, max: 4e-3, landing: 0.25}", f"stages.0.tokens={8 * STEP}"]
    planned = keepwarm("plan", "ci/tiny", *overrides, "--json")
    assert planned.returncode == 0, planned.stderr
    rates = [4e-3] * 2 + [2e-3] * 6
    assert [rate for _, rate in json.loads(planned.stdout)["stages"][0]["learning_rate"]] == rates
    assert "stairs" in keepwarm("plan", "ci/tiny", *overrides).stdout

    folder = tmp_path / "run"
    quick = ["log.tensorboard=false", "checkpoint.every=4"]
    trained = keepwarm("train", "ci/tiny", *overrides, *quick, f"output={folder}")
    assert trained.returncode == 0, trained.stderr
    assert rates_of(folder) == rates
    branched = keepwarm("branch", str(folder), "--at", "4", "--anneal", str(4 * STEP))
    assert branched.returncode == 0, branched.stderr
    assert "learning rate 0.002 to 0.0005" in branched.stderr
    assert rates_of(tmp_path / "run-anneal-4") == pytest.approx([2e-3 - 1.5e-3 * step / 4 for step in range(4)])


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ("{schedule: stairs, max: 1, landng: 0.5}", "lr.landng: unknown key; did you mean stages.0.lr.landing?"),
        ("{schedule: stairs, max: 1, landing: 2}", "stages.0.lr.landing: expected less than 1, got 2"),
        ("{schedule: cosine, max: 1, landing: 0.5}", "unknown key for schedule cosine; schedule stairs has it"),
        ("{schedule: stair, max: 1}", "'stairs' or 'broken', got the text 'stair'; did you mean stairs?"),
        ("{schedule: broken, max: 1}", "schedule 'broken' of the package broken-curve cannot be loaded: No module"),
    ],
)
def test_foreign_curve_wrong_clause_is_refused(keepwarm: Keepwarm, clause: str, said: str) -> None:
    refused = keepwarm("plan", "ci/tiny", f"stages.0.lr={clause}")
    assert refused.returncode == 2
    assert said in refused.stderr


def rates_of(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["lr"] for line in lines if "lr" in line]
