"""Masks, positions and rotary tables that programs save beside the weights are set aside, whatever their dtype."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.convert.deepspeed.exporter import to_deepspeed
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.convert.importer import ImportOptions, from_dcp
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.foreign.hf_models import CASES, hf_model
from tests.support.layouts import Case, whole_state, write_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What files on the Hub hold beside weights: Pythia (uint8 and boolean masks), GPT-2, Llama 1 and 2, BERT's positions.
BESIDE: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "pythia-uint8": (
        "gpt-neox",
        {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril(),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2, dtype=torch.float16),
        },
    ),
    "pythia-bool": ("gpt-neox", {"gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}),
    "gpt2-bool": ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}),
    "llama-positions": (
        "llama",
        {
            "model.embed_positions.position_ids": torch.arange(64)[None],
            "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(64, 8),
            "model.freqs_cis": torch.polar(torch.ones(64, 4), torch.ones(64, 4)),
        },
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_huggingface_constants_are_set_aside_and_weights_come_back(tmp_path: Path, case: str) -> None:
    kind, beside = BESIDE[case]
    hf_model(*CASES[kind]).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(weights | beside, file, {"format": "pt"})
    done = from_huggingface(tmp_path / "hf", tmp_path / "native")
    assert set(beside) <= set(done["left"])
    to_huggingface(tmp_path / "native", tmp_path / "back")
    back = safetensors.torch.load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_huggingface_floating_tensor_without_a_place_is_still_refused(tmp_path: Path) -> None:
    hf_model(*CASES["llama"]).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    extra = {"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)}
    safetensors.torch.save_file(safetensors.torch.load_file(file) | extra, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_scale has no place"):
        from_huggingface(tmp_path / "hf", tmp_path / "native")


MODEL = ModelSpec(layers=2, hidden_size=24, heads=4, ffn_size=12, vocabulary_size=24, max_sequence_length=8)
CONSTANTS = {
    "freqs_cis": torch.polar(torch.ones(8, 3), torch.ones(8, 3)),
    "layers.0.attention.mask": torch.ones(8, 8, dtype=torch.bool),
    "position_ids": torch.arange(8),
    "rope_cache": torch.ones(8, 6),
}


def written(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.model_dump_json())
    return path


def test_dcp_constants_of_any_dtype_are_set_aside(tmp_path: Path, config: Path) -> None:
    weights = {name: value for name, value in whole_state(MODEL, 5).items() if name.startswith("model.")}
    source = written(tmp_path / "dcp", weights | CONSTANTS)
    done = from_dcp(source, tmp_path / "native", kind="dcp", options=ImportOptions(config=config))
    assert done["left"] == sorted(CONSTANTS)


def test_dcp_weight_of_complex_dtype_is_refused_by_name(tmp_path: Path, config: Path) -> None:
    weights = {name: value for name, value in whole_state(MODEL, 5).items() if name.startswith("model.")}
    weights["model.head.weight"] = weights["model.head.weight"].to(torch.complex64)
    source = written(tmp_path / "dcp", weights)
    with pytest.raises(CheckpointError, match=r"model\.head\.weight is of dtype COMPLEX64"):
        from_dcp(source, tmp_path / "native", kind="dcp", options=ImportOptions(config=config))


def test_deepspeed_constants_are_set_aside(tmp_path: Path) -> None:
    meta: dict[str, object] = {"model": MODEL.model_dump(mode="json")}
    native = write_checkpoint(tmp_path / "run", MODEL, Case(spec=ParallelSpec()), whole_state(MODEL, 5), meta)
    to_deepspeed(native, tmp_path / "ds", model_type="llama")
    zero = next((tmp_path / "ds").rglob("zero"))
    for name, value in {"model.rotary_emb.inv_freq": torch.ones(3), "mask": torch.ones(8, 8, dtype=torch.bool)}.items():
        (zero / name).mkdir()
        torch.save({"param": value}, zero / name / "fp32.pt")
    done = from_dcp(tmp_path / "ds", tmp_path / "native", kind="deepspeed", options=ImportOptions(weights_only=True))
    assert {"model.rotary_emb.inv_freq", "mask"} <= set(done["left"])
