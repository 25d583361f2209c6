"""`keepwarm doctor` says what can be used here, and what to install for the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.launch.cli.doctor import findings
from keepwarm.launch.errors import PreflightError
from keepwarm.launch.run.preflight import check_engine
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job

ROOT = Path(__file__).parents[3]


def test_doctor_engines_are_found_with_their_versions() -> None:
    found = {finding.name: finding for finding in findings()}
    assert {"torch", "megatron", "deepspeed", "CUDA", "Apex FusedAdam", "Transformer Engine"} <= set(found)
    assert found["torch"].usable
    assert found["megatron"].usable
    assert "megatron-core 0.16" in found["megatron"].detail


def test_doctor_untested_version_has_its_install_line(tmp_path: Path) -> None:
    info = tmp_path / "megatron_core-0.12.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.12.0\n")
    code = "import sys; from keepwarm.launch.cli import main; sys.argv = ['keepwarm', 'doctor', '--json']; main.main()"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=True,
    )
    found = {one["name"]: one for one in json.loads(ended.stdout)}
    assert not found["megatron"]["usable"]
    assert "tested is 0.16.1: pip install 'keepwarm[megatron]'" in found["megatron"]["detail"]
    assert found["megatron-core"] == {
        "kind": "version",
        "name": "megatron-core",
        "usable": False,
        "detail": "0.12.0, outside the tested range 0.16.1",
    }


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.implementation=apex"], r"implementation = apex.*github\.com/NVIDIA/apex"),
        (["numerics.norms=apex"], r"numerics\.norms = apex.*github\.com/NVIDIA/apex"),
        (
            ["parallel.engine=megatron", "parallel.options.transformer_engine=true"],
            r"transformer_engine = true.*pip install",
        ),
    ],
)
def test_check_engine_missing_kernels_are_refused(
    overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PreflightError, match=words):
        check_engine(load_job(ROOT / "configs/ci/tiny.yaml", overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.options.transformer_engine=true"], r"it belongs to parallel\.engine = megatron"),
        (
            ["parallel.engine=megatron", "parallel.options.transformer_engine=true", "numerics.norms=apex"],
            "set one of them",
        ),
        (["parallel.tensor=2", "parallel.sequence=true", "numerics.norms=apex"], "split by DTensor"),
    ],
)
def test_load_job_kernels_unsupported_by_engine_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_job(ROOT / "configs/ci/tiny.yaml", overrides)
