"""The model spec behind a Hugging Face `config.json`, in the dialects of transformers 4 and 5. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.spec import InitSpec, ModelSpec

GENERIC = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "bad_words_ids",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "language_model_type",
        "max_window_layers",
        "model_type",
        "name_or_path",
        "_name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "use_bfloat16",
        "use_cache",
        "use_return_dict",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
    }
)
"""Fields that say nothing about what the model computes."""

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
PLAIN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass
class _Fields:
    """A config of which every field must be used, known to be harmless, or off."""

    config: Mapping[str, Any]
    used: set[str] = field(default_factory=set)

    def take(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.take(name)
        if value is None:
            raise SpecError(f"config.json: {name} is missing")
        return value

    def harmless(self, *names: str) -> None:
        self.used.update(names)

    def require(self, name: str, value: Any) -> None:
        if self.take(name, value) != value:
            raise SpecError(f"config.json: {name} = {self.config[name]!r} is not supported, only {value!r}")

    def finish(self) -> None:
        for name in sorted(set(self.config) - self.used - GENERIC):
            if self.config[name]:
                raise SpecError(f"config.json: {name} = {self.config[name]!r} is not understood")


def model_spec_from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a model of type llama, mistral, qwen2, qwen3, olmo2, gpt_neox or gpt2.

    Dropout is ignored: there is none here. A field left out has the default of transformers.

    Raises:
        SpecError: naming the field, when a value cannot be expressed or a field that is set is not known.
    """
    fields = _Fields(config)
    kind = fields.need("model_type")
    match kind:
        case "gpt2":
            spec = _gpt2(fields)
        case "gpt_neox":
            spec = _neox(fields)
        case "llama" | "mistral" | "qwen2" | "qwen3" | "olmo2":
            spec = _llama_like(kind, fields)
        case _:
            raise SpecError(
                f"config.json: model_type = {kind!r} is not supported; it may be llama, mistral, qwen2, qwen3, olmo2, "
                "gpt_neox or gpt2"
            )
    fields.finish()
    return ModelSpec(**spec)


def _llama_like(kind: str, fields: _Fields) -> dict[str, Any]:
    heads = fields.need("num_attention_heads")
    fields.harmless("attention_dropout")
    default_kv = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind, heads)
    biased = kind != "mistral" and fields.take("attention_bias", False)
    return {
        "layers": fields.need("num_hidden_layers"),
        "hidden_size": fields.need("hidden_size"),
        "heads": heads,
        "kv_heads": fields.take("num_key_value_heads", default_kv),
        "head_dim": fields.take("head_dim", 128 if kind == "qwen3" else None),
        "ffn_size": fields.need("intermediate_size"),
        "vocabulary_size": fields.need("vocab_size"),
        "max_sequence_length": fields.need("max_position_embeddings"),
        "norm": "rms",
        "norm_eps": fields.take("rms_norm_eps", 1e-5 if kind == "olmo2" else 1e-6),
        "norm_position": "post" if kind == "olmo2" else "pre",
        "activation": _one_of(fields, "hidden_act", "silu", ACTIVATIONS),
        "sliding_window": _sliding_window(kind, fields),
        "qkv_bias": True if kind == "qwen2" else biased,
        "attention_output_bias": False if kind == "qwen2" else biased,
        "mlp_bias": kind == "llama" and fields.take("mlp_bias", False),
        "qk_norm": {"qwen3": "head", "olmo2": "projection"}.get(kind, "none"),
        **_rotary(fields, "rope_theta", None),
        **_shared(fields, tied=False),
    }


def _neox(fields: _Fields) -> dict[str, Any]:
    fields.harmless("attention_dropout", "hidden_dropout", "classifier_dropout")
    biased = fields.take("attention_bias", True)
    return {
        "layers": fields.need("num_hidden_layers"),
        "hidden_size": fields.need("hidden_size"),
        "heads": fields.need("num_attention_heads"),
        "ffn_size": fields.need("intermediate_size"),
        "vocabulary_size": fields.need("vocab_size"),
        "max_sequence_length": fields.need("max_position_embeddings"),
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps", 1e-5),
        "activation": _one_of(fields, "hidden_act", "gelu", PLAIN_ACTIVATIONS),
        "parallel_residual": fields.take("use_parallel_residual", True),
        "qkv_bias": biased,
        "attention_output_bias": biased,
        "mlp_bias": True,
        **_rotary(fields, "rotary_emb_base", "rotary_pct"),
        **_shared(fields, tied=False),
    }


def _gpt2(fields: _Fields) -> dict[str, Any]:
    fields.harmless("resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn", "n_ctx")
    fields.harmless(*(name for name in fields.config if name.startswith("summary_")))
    fields.require("scale_attn_weights", True)
    fields.require("scale_attn_by_inverse_layer_idx", False)
    fields.require("add_cross_attention", False)
    hidden = fields.need("n_embd")
    return {
        "layers": fields.need("n_layer"),
        "hidden_size": hidden,
        "heads": fields.need("n_head"),
        "ffn_size": fields.take("n_inner", 4 * hidden),
        "vocabulary_size": fields.need("vocab_size"),
        "max_sequence_length": fields.need("n_positions"),
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_epsilon", 1e-5),
        "activation": _one_of(fields, "activation_function", "gelu_new", PLAIN_ACTIVATIONS),
        "position": "learned",
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        **_shared(fields, tied=True),
    }


def _shared(fields: _Fields, *, tied: bool) -> dict[str, Any]:
    return {
        "tied_embeddings": fields.take("tie_word_embeddings", tied),
        "init": InitSpec(std=fields.take("initializer_range", 0.02)),
    }


def _one_of(fields: _Fields, name: str, default: str, known: Mapping[str, str]) -> str:
    value = fields.take(name, default)
    if value not in known:
        raise SpecError(f"config.json: {name} = {value!r} is not supported, only {', '.join(sorted(known))}")
    return known[value]


def _sliding_window(kind: str, fields: _Fields) -> int | None:
    """One window for all layers or none; Qwen's mixtures of both are refused."""
    window = fields.config.get("sliding_window", 4096 if kind == "mistral" else None)
    fields.harmless("sliding_window", "layer_types")
    if kind in ("qwen2", "qwen3") and not fields.take("use_sliding_window", False):
        window = None
    types = set(fields.config.get("layer_types") or ())
    if not types <= {"full_attention", "sliding_attention"} or len(types) > 1:
        raise SpecError(f"config.json: layer_types = {sorted(types)} is not supported: all layers must be of one type")
    if not types and kind in ("qwen2", "qwen3") and window is not None and fields.config.get("max_window_layers", 28):
        raise SpecError("config.json: max_window_layers is not supported: all layers must have the sliding window")
    return None if types == {"full_attention"} else window


def _rotary(fields: _Fields, theta: str, fraction: str | None) -> dict[str, Any]:
    """Rotary fields: of their own in transformers 4, inside `rope_parameters` in 5."""
    rope = dict(fields.take("rope_parameters", {}))
    for name in ("rope_parameters", "rope_scaling"):
        scaling = dict(fields.take(name, {}))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise SpecError(f"config.json: {name}.rope_type = {kind!r} is not supported, only 'default'")
    unknown = sorted(set(rope) - {"rope_theta", "rope_type", "type", "partial_rotary_factor"})
    if unknown:
        raise SpecError(f"config.json: rope_parameters.{unknown[0]} is not understood")
    if fraction is None and rope.get("partial_rotary_factor", 1.0) != 1.0:
        # Their classes read it for other kinds of RoPE alone.
        raise SpecError("config.json: rope_parameters.partial_rotary_factor is not supported for this model_type")
    old_fraction = 1.0 if fraction is None else fields.take(fraction, 0.25)
    return {
        "rope_theta": float(rope.get("rope_theta", fields.take(theta, 10000.0))),
        "rotary_fraction": float(rope.get("partial_rotary_factor", old_fraction)),
    }
