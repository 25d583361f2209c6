"""Folders of transformers' own models: their weights in, bit by bit, and an export that transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from keepwarm.launch.run.preflight import check_parent
from keepwarm.trainer.convert.huggingface.exporter import model_spec_of, to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.errors import CheckpointError, DataError, SpecError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.model.shapes import stored_shapes
from keepwarm.trainer.model.transformers.tensors import tensor_names
from tests.support.transformers.models import bare_class, batch_of, spec_from, spec_of, tensors_of, whole_stage

SHIPPED = Path(__file__).parents[3] / "configs" / "ci" / "gemma-3-tiny.yaml"


def published(family: str, folder: Path) -> Any:
    """A model that transformers itself has initialised and saved."""
    spec = spec_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = bare_class(spec, tensors_of(whole_stage(spec)))
        for tensor in (
            *model.parameters(),
            *(one for name, one in model.named_buffers() if name in model.state_dict()),
        ):
            torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "family",
    ["phi3", "gemma3_text", "minicpm3", "granite_swa", "apertus", "codegen", "gemma4_unified_text", "gpt_neox"],
)
def test_published_folder_comes_back_bit_by_bit(family: str, tmp_path: Path) -> None:
    model, stored = published(family, tmp_path / "published"), tmp_path / "published" / "config.json"
    spec = spec_from(json.loads(stored.read_text()))
    from_huggingface(tmp_path / "published", tmp_path / "native", model=spec)
    names = tensor_names(spec)
    theirs = load_file(tmp_path / "published" / "model.safetensors")
    with NativeCheckpoint(tmp_path / "native") as native:
        shapes = {name.removeprefix("model."): tensor.shape for name, tensor in native.tensors.items()}
        assert shapes == stored_shapes(spec)
        with pytest.raises(CheckpointError, match="its layers are those of transformers"):
            model_spec_of(native)
    done = to_huggingface(tmp_path / "native", tmp_path / "export")
    assert done["model_type"] == family
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == theirs.keys() == {names.name(name) for name in shapes}
    assert all(torch.equal(exported[name], theirs[name]) for name in theirs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager")
    tokens = batch_of(0)[0]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(SpecError, match="the layers are those of"):
        to_huggingface(tmp_path / "native", tmp_path / "other", model_type="llama")


def test_weights_of_another_config_are_refused_by_its_field(tmp_path: Path) -> None:
    published("gemma3_text", tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    spec = spec_from({**config, "sliding_window": 7})
    with pytest.raises(CheckpointError, match=r"sliding_window is 5, in the config of the job's model 7"):
        from_huggingface(tmp_path / "published", tmp_path / "native", model=spec)
    assert not (tmp_path / "native").exists()


def test_weights_that_contradict_their_config_are_refused_before_any_process(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    published("phi3", folder)
    overrides = [f"model.transformers={folder}", f"init_from={folder}", f"output={tmp_path / 'run'}"]
    check_parent(load_job(SHIPPED, overrides))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(DataError, match=r"init_from: .*down_proj\.weight is \[32, 48\], .* says \[32, 40\]") as refused:
        check_parent(load_job(SHIPPED, overrides))
    assert "\n" not in str(refused.value)
