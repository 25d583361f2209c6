"""`model.transformers` in a job: resolved once, stored with the run, refused in one sentence before any process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from keepwarm.launch.plan.plan import Plan
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.estimate import total_parameters
from keepwarm.trainer.job.files import load_job, load_run, save_job
from keepwarm.trainer.model.transformers_spec import TransformersSpec

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = CONFIGS / "ci" / "gemma-3-tiny.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped folder, to be changed."""
    return Path(shutil.copytree(CONFIGS / "transformers" / "gemma-3-tiny", tmp_path / "model"))


def change(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return file


def load(folder: Path, *overrides: str) -> Any:
    return load_job(SHIPPED, [f"model.transformers={json.dumps(str(folder))}", *overrides])


def test_run_keeps_the_config_when_its_folder_is_gone(folder: Path, tmp_path: Path) -> None:
    job = load(folder, f"output={tmp_path / 'run'}")
    assert isinstance(job.model, TransformersSpec)
    assert total_parameters(job.model) == 99_216
    assert Plan(job).data()["layout"]["world_size"] == 4
    (tmp_path / "run").mkdir()
    save_job(job, tmp_path / "run" / "run.json")
    shutil.rmtree(folder)
    again = load_run(tmp_path / "run" / "run.json")
    assert again == job
    with pytest.raises(SpecError, match=r"job|gone|No such file"):
        load(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "remote-code": ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map: its model is code"),
    "encoder-decoder": ({"is_encoder_decoder": True}, "decoders alone"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised with awq; only fp8 in blocks and mxfp4"),
    "quantised-somehow": ({"quantization_config": "4bit"}, "quantised with an unnamed method"),
    "experts": ({"num_local_experts": 8}, "mixture of experts"),
    "several-models": ({"text_config": {}}, "text_config: model_type = None is no name of a model"),
    "experts-inside": ({"text_config": {"model_type": "x", "num_experts": 4}}, "text_config: .*mixture of experts"),
    "nameless": ({"model_type": None}, "is no name of a model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_is_refused_by_its_field_without_transformers(case: str, folder: Path) -> None:
    fields, reason = REFUSED[case]
    file = change(folder, **fields)
    with pytest.raises(SpecError, match=reason) as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    assert f"model.transformers: {file}: " in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}'])
def test_file_that_is_no_config_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(SpecError, match=r"config\.json: ") as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_what_transformers_refuses_is_reported_from_its_process(folder: Path) -> None:
    change(folder, model_type="gpt2")
    with pytest.raises(SpecError, match=r"no tensor-parallel and pipeline plan for GPT2LMHeadModel"):
        load(folder)


def test_settings_that_do_not_fit_are_refused_by_their_key(folder: Path) -> None:
    for overrides, reason in (
        (["parallel.tensor=8"], "model.heads = 4 does not divide by parallel.tensor = 8"),
        (["numerics.compile=true"], "numerics.compile: compiled layers of transformers"),
        (["parallel.engine=megatron"], "model.transformers: it has layers of its own; set parallel.engine = torch"),
        (["model.layers=4"], "model.layers: unknown key"),
        (["data.sequence_length=256"], "longer than model.max_sequence_length = 128"),
        (["parallel.pipeline=8"], "layers"),
    ):
        with pytest.raises(SpecError, match=reason):
            load(folder, *overrides)
