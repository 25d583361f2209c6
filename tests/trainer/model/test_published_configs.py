"""Models that people continue: their configs load, weights come back bit by bit, logits equal those of transformers."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from keepwarm.trainer.convert.huggingface.exporter import model_spec_of, to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from tests.support.foreign.huggingface_oracle import rearranged
from tests.support.foreign.published_configs import CONTEXT, REFUSED, published, small
from tests.support.models import load_parameters

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CONFIGS = published()
LOADED = [name for name, config in CONFIGS.items() if config["model_type"] not in REFUSED]
# One of each kind of computation; the rest runs with the long tests.
FEW = (
    "meta-llama/Llama-3.2-1B", "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-Nemo-Base-2407", "Qwen/Qwen3-0.6B",
    "allenai/Olmo-3-1025-7B", "HuggingFaceTB/SmolLM3-3B-Base", "deepseek-ai/deepseek-coder-1.3b-base",
    "EleutherAI/gpt-neox-20b", "distilbert/distilgpt2", "HuggingFaceTB/SmolLM2-135M",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", LOADED)
def test_published_config_gives_a_model_spec(name: str) -> None:
    config = CONFIGS[name]
    spec = model_spec_from_hf_config(config)
    assert spec.layers == config.get("num_hidden_layers", config.get("n_layer"))


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(LOADED)))
def test_published_config_of_another_architecture_is_refused_by_name(name: str) -> None:
    with pytest.raises(SpecError, match=f"model_type = '{CONFIGS[name]['model_type']}' is not supported"):
        model_spec_from_hf_config(CONFIGS[name])


def drawn(config: dict[str, Any], folder: Path) -> Any:
    """A small model of transformers with drawn weights, saved beside the config as it was published."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa")
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * spread + float("norm" in name or "ln_" in name))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return model


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(name, marks=pytest.mark.long) for name in LOADED if name not in FEW)]
)
def test_published_model_comes_back_bit_by_bit_and_computes_the_same(tmp_path: Path, name: str) -> None:
    theirs = drawn(small(CONFIGS[name]), tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "native")
    to_huggingface(tmp_path / "native", tmp_path / "back")
    before, after = (safetensors.torch.load_file(tmp_path / at / "model.safetensors") for at in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    spec = model_spec_of(NativeCheckpoint(tmp_path / "native"))
    ours = Decoder(spec, seed=1).build_stage(range(spec.layers), embed=True, head=True)
    load_parameters(ours, rearranged(theirs.state_dict(), CONFIGS[name]["model_type"], spec))
    # Three times the original context: scaled frequencies and windows all have an effect.
    tokens = torch.randint(0, 96, (2, 3 * CONTEXT), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
        assert expected.std() > 0.1
        assert (logits - expected).abs().max() <= 1e-5
        again = type(theirs).from_pretrained(tmp_path / "back", attn_implementation="sdpa").eval()
        assert torch.equal(again(tokens).logits, expected)
