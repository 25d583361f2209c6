"""What stops a job whose engine is not there, is of another version, or cannot do what is asked: before any process."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from keepwarm.launch.errors import PreflightError
from keepwarm.launch.run.preflight import check_engine
from keepwarm.parallel.deepspeed.info import DeepSpeedOptions
from keepwarm.parallel.engine_registry import ENGINES
from keepwarm.parallel.engine_support import refusals, registered_engine, require
from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.megatron.info import MegatronOptions
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.spec import JobSpec

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


def test_torch_engine_requires_and_refuses_nothing() -> None:
    require(job())
    assert refusals(job()) == []


ZERO_BUBBLE = ("parallel.pipeline=2", "parallel.schedule=zero_bubble")


def test_torch_engine_compiled_zero_bubble_is_refused_when_the_job_is_read() -> None:
    with pytest.raises(SpecError, match=r"parallel\.engine = torch: .* zero_bubble splits backward"):
        job(*ZERO_BUBBLE, "numerics.compile=true")
    job("parallel.schedule=zero_bubble", "numerics.compile=true")


@pytest.mark.parametrize(("version", "runs"), [("2.12.1+cu130", False), ("2.13.0+cpu", True)])
def test_torch_engine_zero_bubble_needs_the_installed_torch_to_split_backward(
    installed: Path, version: str, runs: bool
) -> None:
    install(installed, "torch", version)
    require(job("parallel.pipeline=2"))
    require(job("parallel.schedule=zero_bubble"))
    if runs:
        check_engine(job(*ZERO_BUBBLE))
        return
    with pytest.raises(PreflightError, match=r"zero_bubble needs torch 2\.13, 2\.12\.1\+cu130 is installed"):
        check_engine(job(*ZERO_BUBBLE))


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.16.1", True),
        ("0.16.1+local", True),
        ("0.16.2", False),
        ("0.16.1rc0", False),
        ("0.17.0", False),
        ("0.15.0", False),
    ],
)
def test_engine_version_other_than_tested_is_refused(installed: Path, version: str, tested: bool) -> None:
    install(installed, "megatron-core", version)
    if tested:
        require(job("parallel.engine=megatron"))
        return
    expected = rf"{re.escape(version)} is installed, tested is 0\.16\.1: pip install 'keepwarm\[megatron\]'"
    with pytest.raises(EngineUnavailable, match=expected):
        require(job("parallel.engine=megatron"))


INSTALL = {
    "megatron": ("megatron-core", "pip install 'keepwarm[megatron]'"),
    "deepspeed": ("deepspeed", "DS_BUILD_OPS=0 pip install 'keepwarm[deepspeed]'"),
}


def refused(arguments: Sequence[str], *paths: Path, options: Sequence[str] = ()) -> str:
    """What a command says that ends with exit code 2; `paths` are searched before what is installed."""
    ended = subprocess.run(
        [sys.executable, *options, "-P", "-m", "keepwarm", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT / "src")))},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


@pytest.mark.parametrize("engine", INSTALL)
def test_engine_not_installed_exits_2_and_starts_nothing(engine: str, tmp_path: Path) -> None:
    """With links to everything that is installed but the engine in the place of the site packages."""
    distribution, command = INSTALL[engine]
    others = tmp_path / "site"
    others.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith((distribution, distribution.replace("-", "_"), "__editable__", "keepwarm")):
            (others / entry.name).symlink_to(entry)
    output = tmp_path / "run"
    job = ["train", str(TINY), f"parallel.engine={engine}", f"output={output}"]
    error = refused(job, others, options=["-S"])
    assert f"parallel.engine = {engine}: {distribution} is not installed: {command}" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("engine", "job"),
    [
        ("megatron", ["train", str(TINY)]),
        ("deepspeed", ["train", str(TINY), "--nodes", "2", "parallel.data=2", "cluster.ranks_per_node=1"]),
        ("megatron", ["drill", str(TINY), "--kill", "worker:0@3", "snapshot={every: 1}"]),
        ("deepspeed", ["submit", str(TINY), "--dry-run"]),
    ],
    ids=["train", "nodes", "drill", "submit"],
)
def test_engine_untested_version_exits_2_and_starts_nothing(
    engine: str, job: list[str], installed: Path, tmp_path: Path
) -> None:
    distribution, command = INSTALL[engine]
    install(installed, distribution, "0.12.0")
    output = tmp_path / "run"
    error = refused([*job, f"parallel.engine={engine}", f"output={output}"], installed)
    assert f"{distribution} 0.12.0 is installed, tested is" in error
    assert command in error
    assert not output.exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.engine=megatron", "parallel.data_mode=hsdp"),
        ("parallel.engine=deepspeed", "numerics.compile=true"),
    ],
    ids=lambda value: value[0],
)
def test_engine_unsupported_option_exits_2_and_starts_nothing(overrides: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "run"
    error = refused(["train", str(TINY), *overrides, f"output={output}"])
    engine, option = (override.partition("=") for override in overrides)
    assert f"parallel.engine = {engine[2]}: {option[0]}" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.norm_position=post", "model.norm_position"),
        ("model.parallel_residual=true", "model.parallel_residual"),
        ("model.qk_norm=projection", "model.qk_norm"),
        ("model.sliding_window=8", "model.sliding_window"),
        ("model.rope_scaling={type: linear, factor: 2}", r"model.rope_scaling.type = linear"),
        ("model.rope_scaling={type: llama3, factor: 8}", r"model.rope_scaling: .*8192.* not \(1.0, 4.0, 256\)"),
        ("model.nope_layers=[0]", "model.nope_layers"),
        ("model.mlp_bias=true", "model.mlp_bias"),
        ("parallel.data_mode=hsdp", "parallel.data_mode"),
        ("optimizer.name=sgd", "optimizer.name"),
        ("numerics.precision=fp64", "numerics.precision"),
        ("numerics.compile=true", "numerics.compile"),
    ],
)
def test_megatron_unsupported_option_is_refused(override: str, named: str) -> None:
    with pytest.raises(SpecError, match=rf"parallel\.engine = megatron: {named}"):
        job("parallel.engine=megatron", override)


def test_engine_class_is_where_its_information_says() -> None:
    for name in ENGINES.names():
        assert registered_engine(name).engine_class().__name__.endswith("Engine")


@pytest.mark.parametrize("key", ["zero_stage=2", "offload_optimizer=true"])
def test_option_in_its_old_place_is_refused_with_the_new_one(key: str) -> None:
    option = key.partition("=")[0]
    with pytest.raises(SpecError, match=rf"it was renamed; write parallel\.options\.{option}"):
        job("parallel.engine=deepspeed", f"parallel.{key}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.engine=megatro"], "unknown engine 'megatro'; did you mean 'megatron'? there are: torch, megatron"),
        (["parallel.engine=deepspeed", "parallel.options.zero_stge=2"], "did you mean parallel.options.zero_stage?"),
        (["parallel.engine=deepspeed", "parallel.options.zero_stage=4"], "zero_stage: expected 1, 2 or 3, got 4"),
        (["parallel.options.other=1"], "unknown key of this engine, which has no options"),
        (["parallel.options=3"], "parallel.options: expected a section with keys, got 3"),
    ],
)
def test_option_that_its_engine_does_not_have_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(SpecError, match=re.escape(said)):
        job(*overrides)


def test_options_of_another_engine_are_not_handed_out() -> None:
    parallel = job("parallel.engine=deepspeed", "parallel.options.zero_stage=2").parallel
    assert parallel.options_as(DeepSpeedOptions).zero_stage == 2
    with pytest.raises(TypeError, match=r"options of parallel\.engine = deepspeed are no MegatronOptions"):
        parallel.options_as(MegatronOptions)


def test_options_survive_the_resolved_job() -> None:
    spec = job("parallel.engine=deepspeed", "parallel.options.zero_stage=3")
    assert json.loads(spec.model_dump_json())["parallel"]["options"] == {"zero_stage": 3, "offload_optimizer": False}
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_interleaved_micro_batches_of_megatron_divide_by_the_pipeline() -> None:
    interleaved = ["parallel.pipeline=2", "parallel.schedule=interleaved", "batch.global_batch_size=3"]
    assert job(*interleaved).parallel.stages == 4
    with pytest.raises(SpecError, match=r"divides by parallel\.pipeline = 2, got 3"):
        job("parallel.engine=megatron", *interleaved)
