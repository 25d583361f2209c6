"""The config.json of an export: its parent's own where there is one, else made from the model spec. Torch-free."""

from collections.abc import Mapping
from typing import Any

from keepwarm.trainer.convert.dtypes import NAMES
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from keepwarm.trainer.model.huggingface_names import FAMILIES
from keepwarm.trainer.model.spec import ModelSpec

Config = dict[str, Any]

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

_TRAINING_ONLY = {"init", "z_loss"}


def computes(spec: ModelSpec) -> Config:
    """What of a spec changes the result of a forward pass, in one form: equal for models that compute the same."""
    fields = spec.model_dump(exclude=_TRAINING_ONLY)
    fields |= {"kv_heads": spec.key_value_heads, "head_dim": spec.size_per_head}
    if spec.position == "learned":
        fields |= {"rope_theta": None, "rotary_fraction": None}
    return fields


def config_for(spec: ModelSpec, model_type: str | None = None) -> Config:
    """A config whose class computes what `spec` does: of `model_type`, or of the first type that can.

    Raises:
        SpecError: none can; names the field.
    """
    misfits = []
    for kind in (model_type,) if model_type else tuple(FAMILIES):
        if kind not in FAMILIES:
            raise SpecError(f"model type {kind!r} is not supported; it may be {', '.join(FAMILIES)}")
        config = in_both_dialects(_made(spec, kind), spec)
        misfit = _misfit(config, spec)
        if misfit is None:
            return config
        misfits.append((len(misfit), kind, misfit))
    _, kind, misfit = min(misfits)
    raise SpecError(f"model.{misfit[0]} = {getattr(spec, misfit[0])!r} cannot be expressed by a model of type {kind}")


def in_both_dialects(config: Mapping[str, Any], spec: ModelSpec) -> Config:
    """With the fields that only transformers 4 or only 5 reads added from their twins; nothing else changes."""
    made = dict(config)
    for name, twin in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        if made.get(name) is not None:
            made.setdefault(twin, made[name])
    if made["model_type"] != "gpt2":
        old = {"rope_theta": spec.rope_theta}
        new = {"rope_type": "default", "rope_theta": spec.rope_theta}
        if made["model_type"] == "gpt_neox":
            old = {"rotary_emb_base": spec.rope_theta, "rotary_pct": spec.rotary_fraction}
            new |= {"partial_rotary_factor": spec.rotary_fraction}
        if made.get("rope_parameters") is None:
            made["rope_parameters"] = new
        made = {**old, **made}
    return made


def with_dtype(config: Mapping[str, Any], dtype: str) -> Config:
    """With the dtype of the weights, in every dialect that the config speaks."""
    fields = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype", "torch_dtype"]
    return {**config, **dict.fromkeys(fields, NAMES[dtype])}


def fits(config: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Whether a config describes a model that computes what `spec` does."""
    return _misfit(config, spec) is None


def _misfit(config: Mapping[str, Any], spec: ModelSpec) -> list[str] | None:
    there, here = computes(model_spec_from_hf_config(config)), computes(spec)
    return [name for name in here if there[name] != here[name]] or None


def _made(spec: ModelSpec, kind: str) -> Config:
    common: Config = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": spec.vocabulary_size,
        "tie_word_embeddings": spec.tied_embeddings,
        "initializer_range": spec.init.std,
        "use_cache": True,
        # Their defaults are Llama's own ids, which mean nothing in another vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "gpt2":
        return common | _gpt2(spec)
    common |= {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn_size,
        "max_position_embeddings": spec.max_sequence_length,
        "attention_dropout": 0.0,
    }
    return common | (_neox(spec) if kind == "gpt_neox" else _llama_like(spec, kind))


def _llama_like(spec: ModelSpec, kind: str) -> Config:
    made: Config = {
        "num_key_value_heads": spec.key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
    }
    if kind in ("llama", "mistral", "qwen3") or spec.head_dim is not None:
        made["head_dim"] = spec.size_per_head
    if kind in ("llama", "qwen3", "olmo2"):
        made["attention_bias"] = spec.attention_output_bias
    if kind == "llama":
        made["mlp_bias"] = spec.mlp_bias
    if kind == "mistral":
        made["sliding_window"] = spec.sliding_window
    if kind in ("qwen2", "qwen3"):
        windowed = spec.sliding_window is not None
        made |= {"use_sliding_window": windowed, "sliding_window": spec.sliding_window, "max_window_layers": 0}
        made["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * spec.layers
    return made


def _neox(spec: ModelSpec) -> Config:
    return {
        "hidden_act": _activation(spec),
        "hidden_dropout": 0.0,
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.parallel_residual,
        "attention_bias": spec.attention_output_bias,
    }


def _gpt2(spec: ModelSpec) -> Config:
    return {
        "n_embd": spec.hidden_size,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "n_inner": spec.ffn_size,
        "n_positions": spec.max_sequence_length,
        "activation_function": _activation(spec),
        "layer_norm_epsilon": spec.norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _activation(spec: ModelSpec) -> str:
    return "gelu_new" if spec.activation == "gelu_tanh" else "gelu"
