"""What stops a job whose engine is not there, is of another version, or cannot do what is asked: before any process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.errors import PreflightError
from launch.preflight import check_engine
from parallel.engine_support import ENGINES, refusals, require
from parallel.errors import EngineUnavailable
from trainer.errors import SpecError
from trainer.spec import JobSpec
from trainer.spec_file import load_job

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/ci/tiny.yaml"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of all others, into which `install` puts the metadata of distributions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(folder: Path, distribution: str, version: str) -> None:
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def job(*overrides: str) -> JobSpec:
    return load_job(TINY, list(overrides))


def test_torch_needs_nothing_and_refuses_nothing() -> None:
    require("torch")
    assert refusals(job()) == []


def test_a_version_that_was_not_tested_is_named(installed: Path) -> None:
    install(installed, "megatron-core", "0.17.0")
    with pytest.raises(EngineUnavailable, match=r"megatron-core 0\.17\.0 .*pip install 'megatron-core>=0\.16\.1"):
        require("megatron")


@pytest.mark.parametrize("version", ["0.16.1", "0.16.2rc1", "0.16.10+local"])
def test_tested_versions_pass(installed: Path, version: str) -> None:
    install(installed, "megatron-core", version)
    require("megatron")


def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    with pytest.raises(PreflightError, match=r"megatron-core is not installed: pip install 'megatron-core"):
        check_engine(job("parallel.engine=megatron", "parallel.data_mode=replicate"))
    with pytest.raises(PreflightError, match=r"deepspeed is not installed: DS_BUILD_OPS=0 pip install 'deepspeed"):
        check_engine(job("parallel.engine=deepspeed"))


def test_training_with_an_untested_version_ends_with_2_and_starts_nothing(installed: Path, tmp_path: Path) -> None:
    install(installed, "megatron-core", "0.15.0")
    output = tmp_path / "run"
    command = [sys.executable, "-P", "-m", "launch.cli", "train", str(TINY), "parallel.engine=megatron"]
    ended = subprocess.run(
        [*command, f"output={output}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert ended.returncode == 2, ended.stderr
    assert "megatron-core 0.15.0" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.norm_position=after", "model.norm_position"),
        ("model.parallel_residual=true", "model.parallel_residual"),
        ("model.qk_norm=projection", "model.qk_norm"),
        ("model.sliding_window=8", "model.sliding_window"),
        ("model.mlp_bias=true", "model.mlp_bias"),
        ("parallel.data_mode=hsdp", "parallel.data_mode"),
        ("optimizer.name=sgd", "optimizer.name"),
        ("numerics.precision=fp64", "numerics.precision"),
        ("numerics.compile=true", "numerics.compile"),
    ],
)
def test_megatron_refuses_what_it_cannot_express(override: str, named: str) -> None:
    with pytest.raises(SpecError, match=rf"parallel\.engine = megatron: {named}"):
        job("parallel.engine=megatron", override)


def test_every_engine_says_where_it_is() -> None:
    for info in ENGINES.values():
        assert info.module.startswith("parallel.")
        assert info.name.endswith("Engine")
