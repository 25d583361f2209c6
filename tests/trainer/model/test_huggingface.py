"""The oracle: equal logits with the `transformers` classes for random weights of every family."""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from tests.support.foreign.hf_models import CASES, hf_model
from tests.support.foreign.huggingface_oracle import rearranged
from tests.support.models import load_parameters

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize("case", CASES)
def test_huggingface_logits_equal_transformers(case: str) -> None:
    kind, changes = CASES[case]
    theirs = hf_model(kind, changes)
    spec = model_spec_from_hf_config(theirs.config.to_dict())
    ours = Decoder(spec, seed=1).build_stage(range(spec.layers), embed=True, head=True)
    load_parameters(ours, rearranged(theirs.state_dict(), kind, spec))
    tokens = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() <= 1e-5


LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
PYTHIA_70M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


def test_huggingface_config_both_dialects_give_one_spec() -> None:
    new = {key: value for key, value in LLAMA_3_8B.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert model_spec_from_hf_config(new) == model_spec_from_hf_config(LLAMA_3_8B)
    assert model_spec_from_hf_config(LLAMA_3_8B).rope_theta == 500000.0
    old = {key: value for key, value in PYTHIA_70M.items() if not key.startswith("rotary")}
    rope = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    assert model_spec_from_hf_config(old | {"rope_parameters": rope}) == model_spec_from_hf_config(PYTHIA_70M)
    assert model_spec_from_hf_config(PYTHIA_70M).rotary_fraction == 0.25


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [8, 8]}}, "mrope_section"),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "contradict",
        ),
        ({"layer_types": ["sliding_attention"] * 32, "sliding_window": 64}, "layer_types"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"hidden_size": None}, "hidden_size"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (
            {"model_type": "smollm3", "layer_types": ["sliding_attention"] * 32, "sliding_window": 8},
            "use_sliding_window",
        ),
    ],
)
def test_huggingface_config_unsupported_field_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        model_spec_from_hf_config(LLAMA_3_8B | changes)


def test_huggingface_config_that_says_rotary_fields_twice_is_read() -> None:
    twice = PYTHIA_70M | {"rope_theta": 10000, "partial_rotary_factor": 0.25}
    assert model_spec_from_hf_config(twice) == model_spec_from_hf_config(PYTHIA_70M)
    with pytest.raises(SpecError, match="rope_theta"):
        model_spec_from_hf_config(twice | {"rope_theta": 20000})
    assert model_spec_from_hf_config(LLAMA_3_8B | {"partial_rotary_factor": 1.0})
    with pytest.raises(SpecError, match="partial_rotary_factor"):
        model_spec_from_hf_config(LLAMA_3_8B | {"partial_rotary_factor": 0.5})


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_huggingface_window_that_no_layer_has_is_no_window(kind: str, used: bool) -> None:
    config = LLAMA_3_8B | {"model_type": kind, "use_sliding_window": used, "sliding_window": 4096}
    assert model_spec_from_hf_config(config | {"max_window_layers": 32}).sliding_window is None
    assert model_spec_from_hf_config(config | {"max_window_layers": 99}).sliding_window is None
    assert model_spec_from_hf_config(config | {"max_window_layers": 0}).sliding_window == (4096 if used else None)
