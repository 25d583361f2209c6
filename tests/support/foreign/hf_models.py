"""Small Hugging Face models of every family and variant, with weights that all matter."""

import json
from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SMALL_GPT2: dict[str, Any] = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"num_key_value_heads": 2, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-grouped-tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-head-dim-theta": ("llama", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2-window": (
        "qwen2",
        {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-window": (
        "qwen3",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "olmo2": ("olmo2", {"num_key_value_heads": 4}),
    # Contexts below the 48 tokens that tests use, so that the scaled frequencies have an effect.
    "llama-llama3": (
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-linear": ("llama", _rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", {"max_position_embeddings": 24, **_rope("dynamic", factor=2.0)}),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-longrope": (
        "llama",
        _rope(
            "longrope",
            factor=4.0,
            original_max_position_embeddings=16,
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.5, 2.0, 3.0, 5.0],
        ),
    ),
    "qwen2-yarn-untruncated": (
        "qwen2",
        _rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0, truncate=False),
    ),
    "qwen2-mixed-window": (
        "qwen2",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
        | {"num_key_value_heads": 4},
    ),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "num_key_value_heads": 4, "sliding_window": 7}),
    "olmo3-yarn": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "num_key_value_heads": 2}),
    "smollm3-window": (
        "smollm3",
        {"num_hidden_layers": 4, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 7},
    ),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neox-serial-tanh": (
        "gpt_neox",
        {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False},
    ),
    "gpt-neox-half-rotary": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-untied-gelu": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 96}),
}


def hf_model(kind: str, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A `transformers` model with weights far enough from their start that every one of them matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**(SMALL_GPT2 if kind == "gpt2" else SMALL), **changes})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * spread + float("norm" in name or "ln_" in name))
    return model.to(dtype)


def old_dialect(folder: Path) -> None:
    """Rewrite a config.json as transformers 4 would have written it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None)
    if rope is not None and config["model_type"] == "olmo3":
        config["rope_theta"] = rope["full_attention"].pop("rope_theta")
        config["rope_scaling"] = rope["full_attention"]
    elif rope is not None:
        neox = config["model_type"] == "gpt_neox"
        config["rotary_emb_base" if neox else "rope_theta"] = rope["rope_theta"]
        if neox:
            config["rotary_pct"] = rope["partial_rotary_factor"]
        else:
            scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
            config["rope_scaling"] = None if rope["rope_type"] == "default" else scaled
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.48.0"
    path.write_text(json.dumps(config, indent=2))
