"""Configs of published models, and small models that keep their ratios.

`published_configs.jsonl` has one model a line: its name, where its values were looked up, and its `config.json`.
"""

import json
import math
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".jsonl")

REFUSED = {"olmo", "phi", "phi3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "falcon", "stablelm"}
"""`model_type`s that keepwarm has no family for."""
CONTEXT = 32
"""Original context of the small models; all other lengths keep their ratio to it."""


def published() -> dict[str, dict[str, Any]]:
    """The configs by name."""
    lines = map(json.loads, FILE.read_text().splitlines())
    return {entry["name"]: entry["config"] for entry in lines}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a small model of the same kind: widths, heads, contexts and windows keep their ratios."""
    made = _small_gpt2(config) if config["model_type"] == "gpt2" else _small_llama(config)
    # Special tokens within the small vocabulary: transformers gives the padding token a row of its own.
    return {name: value % 96 if name.endswith("_token_id") and value else value for name, value in made.items()}


def _small_gpt2(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 96, "n_ctx": 96, "vocab_size": 96}


def _small_llama(config: dict[str, Any]) -> dict[str, Any]:
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    per_group = heads // groups if groups else 1
    few = per_group * max(1, 4 // per_group)
    size = 16 if config.get("rotary_pct") == 0.25 else 8
    own = config.get("head_dim") or config["hidden_size"] // heads
    hidden = _near(config["hidden_size"] / (heads * own) * few * size, few if "head_dim" not in config else 4)
    layers = 5 if "no_rope_layers" in config or "layer_types" in config else 2
    made = config | {
        "hidden_size": hidden,
        "intermediate_size": _near(hidden * config["intermediate_size"] / config["hidden_size"], 4),
        "num_attention_heads": few,
        "num_hidden_layers": layers,
        "vocab_size": 96,
        **({"num_key_value_heads": few // per_group} if groups else {}),
        **({"head_dim": size} if "head_dim" in config else {}),
    }
    scaling = config.get("rope_scaling") or {}
    longest = config["max_position_embeddings"]
    original = scaling.get("original_max_position_embeddings", longest)
    made["max_position_embeddings"] = CONTEXT * longest // original
    if "original_max_position_embeddings" in scaling:
        made["rope_scaling"] = scaling | {"original_max_position_embeddings": CONTEXT}
    if config.get("sliding_window"):
        made["sliding_window"] = max(3, math.ceil(CONTEXT * config["sliding_window"] / original))
    for name in ("no_rope_layers", "layer_types"):
        if name in config:
            made[name] = config[name][:layers]
    if config.get("max_window_layers"):
        made["max_window_layers"] = round(layers * config["max_window_layers"] / config["num_hidden_layers"])
    return made


def _near(value: float, step: int) -> int:
    return max(1, round(value / step)) * step
