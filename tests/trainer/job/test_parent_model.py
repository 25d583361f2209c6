"""A job without `model`: that of the Hugging Face folder in `init_from`, native where keepwarm has its family."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepwarm.launch.cli.main import app
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.model.transformers_spec import TransformersSpec
from tests.support.foreign.hf_models import CASES, SMALL

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file that names neither model nor parent."""
    text = (CONFIGS / "ci" / "tiny.yaml").read_text().replace("../corpora", str(CONFIGS / "corpora"))
    lines = [line for line in text.splitlines() if not line.startswith("model:")]
    file = tmp_path / "job.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


def parent(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def llama(folder: Path, **changes: Any) -> Path:
    return parent(folder, model_type="llama", **{**SMALL, **CASES["llama-llama3"][1], **changes})


def test_job_without_model_takes_the_native_family_of_its_parent(job: Path, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    found = load_job(job, [f"init_from={folder}", "data.sequence_length=32"])
    assert isinstance(found.model, ModelSpec)
    assert found.model.rope_scaling is not None
    assert (found.model.rope_scaling.type, found.model.hidden_size, found.init_from) == ("llama3", 64, str(folder))
    # A key of the model may be changed as in any other job.
    assert load_job(job, [f"init_from={folder}", "model.z_loss=1e-4"]).model.z_loss == 1e-4


def test_job_without_model_takes_a_class_of_transformers_otherwise(job: Path, tmp_path: Path) -> None:
    folder = CONFIGS / "transformers" / "gemma-3-tiny"
    file = tmp_path / "named.yaml"
    file.write_text(f"init_from: {folder}\n" + job.read_text())
    found = load_job(file)
    assert isinstance(found.model, TransformersSpec)
    assert (found.model.transformers, found.model.model_type) == (str(folder), "gemma3_text")
    shown = CliRunner().invoke(app, ["plan", str(file), "--json"], catch_exceptions=False)
    assert json.loads(shown.stdout)["parameters"]["total"] == 99_216, shown.stdout[:2000]


def test_native_family_that_cannot_express_a_config_leaves_it_to_transformers(job: Path, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama", hidden_act="gelu", num_key_value_heads=2)
    found = load_job(job, [f"init_from={folder}"])
    assert isinstance(found.model, TransformersSpec)


def test_parent_that_neither_can_compute_is_refused_with_both_reasons(job: Path, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama", hidden_act="nonesuch")
    with pytest.raises(SpecError, match=r"init_from: .*config\.json: .*; nor as model\.transformers: ") as refused:
        load_job(job, [f"init_from={folder}"])
    assert "\n" not in str(refused.value)
    with pytest.raises(SpecError, match="model"):
        load_job(job, [f"init_from={tmp_path}"])


def test_model_that_a_job_names_is_taken_whatever_its_parent(job: Path, tmp_path: Path) -> None:
    found = load_job(job, [f"init_from={llama(tmp_path / 'llama')}", "model=tiny"])
    assert found.model.hidden_size != 64
