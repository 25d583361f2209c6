"""Folders of several models: the text decoder trains, the tensors of the others come out byte for byte."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Gemma3Config, Mistral3Config

from keepwarm.ft.format.manifest import read_manifest
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.transformers.resolve import resolved
from keepwarm.trainer.model.transformers_spec import TransformersSpec
from tests.support.transformers.models import batch_of, config_of, spec_from

_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def composite(kind: str) -> Any:
    """A toy of a published model that reads pictures too."""
    if kind == "gemma3":
        vision = {**_VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
        text = config_of("gemma3_text", tie_word_embeddings=True)
        return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    vision = {**_VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8}
    text = config_of("mistral", tie_word_embeddings=False)
    return Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)


def published(kind: str, folder: Path) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(composite(kind), attn_implementation="eager")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return model.eval()


def spec_of_folder(folder: Path) -> TransformersSpec:
    return spec_from(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_text_decoder_of_several_models_comes_back_with_the_others_byte_for_byte(kind: str, tmp_path: Path) -> None:
    model = published(kind, tmp_path / "published")
    section = resolved({"transformers": str(tmp_path / "published")})
    spec = spec_from(section["config"])
    assert spec.model_type == kind
    done = from_huggingface(tmp_path / "published", tmp_path / "native", model=spec)
    theirs = load_file(tmp_path / "published" / "model.safetensors")
    assert done["passed_on"]
    assert all("language_model" not in name for name in done["passed_on"])
    done = to_huggingface(tmp_path / "native", tmp_path / "export", max_shard_bytes=20_000)
    exported = {name: value for file in done["files"] for name, value in load_file(tmp_path / "export" / file).items()}
    assert exported.keys() == theirs.keys()
    for name, value in theirs.items():
        assert exported[name].dtype == value.dtype
        assert torch.equal(exported[name], value), name
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("published", "export"))
    assert after == before
    assert (tmp_path / "export" / "preprocessor_config.json").exists()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", attn_implementation="eager")
    tokens = batch_of(0)[0]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_folder_of_the_others_that_is_gone_or_another_one_is_named(tmp_path: Path) -> None:
    published("gemma3", tmp_path / "published")
    from_huggingface(tmp_path / "published", tmp_path / "native", model=spec_of_folder(tmp_path / "published"))
    assert read_manifest(tmp_path / "native").meta["parent"]["path"] == str(tmp_path / "published")
    config = tmp_path / "published" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mistral3"}))
    with pytest.raises(CheckpointError, match="is no longer the folder that the weights of"):
        to_huggingface(tmp_path / "native", tmp_path / "export")
    shutil.rmtree(tmp_path / "published")
    with pytest.raises(CheckpointError, match=r"published, which has neither config\.json nor") as refused:
        to_huggingface(tmp_path / "native", tmp_path / "export")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "export").exists()


def test_text_decoder_that_cannot_be_trained_is_refused_by_its_reason(tmp_path: Path) -> None:
    fields = {"model_type": "some_vl", "text_config": config_of("mixtral", num_local_experts=8)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SpecError, match=r"text_config: model_type = 'mixtral' is a mixture of experts"):
        resolved({"transformers": str(tmp_path)})
