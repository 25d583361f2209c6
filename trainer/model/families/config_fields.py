"""Fields of a Hugging Face `config.json`: each is read, known to change nothing, or judged by its name. Torch-free."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from keepwarm.trainer.errors import SpecError

GENERIC = frozenset(
    {
        "architectures", "attn_implementation", "auto_map", "bad_words_ids", "chunk_size_feed_forward", "dtype",
        "id2label", "is_decoder", "keys_to_ignore_at_inference", "label2id", "language_model_type",
        "max_window_layers", "model_type", "name_or_path", "num_labels", "num_logits_to_keep", "output_attentions",
        "output_hidden_states", "output_router_logits", "pretraining_tp", "problem_type", "return_dict",
        "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
        "use_bfloat16", "use_cache", "use_return_dict",
    }
)  # fmt: skip
"""Fields of every configuration class that do not affect what the model computes."""

_HARMLESS = re.compile(
    r"^_|dropout|pdrop|layerdrop|_token_(id|ids|index)$|^(init|initializer)_|_std$|flash_?attn|flash_attention"
    r"|^(summary|forced|suppress|begin_suppress|classifier)_|^(tokenizer|generation|unsloth|trl|onnx|mlx)(_|$)"
)
"""Names of fields that change nothing for a causal model: private ones, dropout (keepwarm has none), special tokens,
initial values, other tasks' heads, other programs' notes."""

_COMPUTING = re.compile(
    r"quant|expert|(^|_)(act|activations?|alibi|attn|attention|bias|blocks?|(soft_?)?cap(ping)?|softcap\w*|causal|clip|conv"
    r"|compress|d|dense|depth|dim|embed\w*|emb|eps|ffn?|gat(e|ed|ing)|groups?|heads?|hidden|indexer|inner"
    r"|intermediate|ple|kv|layers?|layernorm|linear|logits?|lora|loops?|mamba|mixer|mla|mlp|moe|mrope|multipliers?"
    r"|multiply|mup\w*|n|ngpt|norm|parallel|passes|pooling|positions?|prefix|q|qk|qkv|rank|recurren\w*|rel|relative"
    r"|rescale|residual|rms|rope|rotary|rout(e|ed|er)|scal(e|ed|ing|ar)|scoring|sink|sparse|ssm|state|swa|swiglu"
    r"|tie|tied|time|topk|vocab|window)(_|$)",
    re.IGNORECASE,
)
"""Names that some architecture gives to a part of its computation."""

_SHOWN = 80
"""Characters of a value in a message."""


class ConfigFields:
    """A config.json from which a model family takes its fields.

    What transformers' class for the family declares, the family takes. It attaches every other field to the config as
    an attribute that its own code never reads, but a field named like a part of a computation was set by a program that
    may have read it: `finish` refuses these unless they are in `ignored`, and passes over the rest. With code of its
    own (`auto_map`), a model may read any field.
    """

    def __init__(self, config: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        self._config = config
        self._ignored = frozenset(ignored)
        self._used: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field, or `default` if it is absent or null."""
        value = self.take_nullable(name, default)
        return default if value is None else value

    def take_nullable(self, name: str, default: Any) -> Any:
        """Return a field, or `default` if it is absent; null is a value in its own right."""
        self._used.add(name)
        return self._config.get(name, default)

    def need(self, name: str) -> Any:
        """Return a field. Raise `SpecError` if it is absent or null."""
        value = self.take(name)
        if value is None:
            raise SpecError(f"config.json: {name} is missing")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a whole number; needed unless there is a default. Raise `SpecError` for anything else."""
        value = self.need(name) if default is None else self.take(name, default)
        if type(value) is not int:
            raise SpecError(f"config.json: {name} = {shown(value)} is not a whole number")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a finite number. Raise `SpecError` for anything else."""
        return finite(self.take(name, default), name)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false. Raise `SpecError` for anything else."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise SpecError(f"config.json: {name} = {shown(value)} is neither true nor false")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """Return an object, empty if absent. Raise `SpecError` for anything else."""
        value = self.take(name, {})
        if not isinstance(value, Mapping):
            raise SpecError(f"config.json: {name} = {shown(value)} is not an object")
        return dict(value)

    def choose(self, name: str, default: str, known: Mapping[str, str]) -> str:
        """Return the translation of a field's value. Raise `SpecError` if it is not in `known`."""
        value = self.take(name, default)
        if not isinstance(value, str) or value not in known:
            raise SpecError(f"config.json: {name} = {shown(value)} is not supported, only {', '.join(sorted(known))}")
        return known[value]

    def require(self, name: str, value: Any) -> None:
        """Raise `SpecError` if a field is set to anything but `value`."""
        if self.take(name, value) != value:
            raise SpecError(f"config.json: {name} = {shown(self._config[name])} is not supported, only {value!r}")

    def harmless(self, *names: str) -> None:
        """Accept any value of fields that do not change what the model computes here."""
        self._used.update(names)

    def finish(self) -> list[str]:
        """Return the fields that were passed over. Raise `SpecError` if one may change what the model computes."""
        taken = sorted(self._ignored & self._used & set(self._config))
        if taken:
            raise SpecError(f"config.json: {taken[0]} is a field that keepwarm reads, and cannot be ignored")
        own_code = any(str(name).startswith("AutoModel") for name in self.table("auto_map"))
        self.require("is_causal", True)  # of every family; transformers masks nothing where it is false
        unread = [
            name
            for name in sorted(set(self._config) - self._used - GENERIC)
            if self._config[name] is not None and not _HARMLESS.search(name)
        ]
        for name in unread:
            # What is off is off here as well; with code of its own, a model may compute something then.
            on = self._config[name] and _COMPUTING.search(name)
            if name not in self._ignored and (own_code or on):
                reader = "the model's own code (auto_map) may read it" if own_code else "it may change the computation"
                raise SpecError(
                    f"config.json: {name} = {shown(self._config[name])} is not understood, and {reader}; if it changes "
                    f"nothing, give --ignore-key {name}, or init_from_ignore_keys: [{name}] in a job"
                )
        return unread


def finite(value: Any, name: str) -> float:
    """Return a finite number as a float. Raise `SpecError` for anything else, naming the field."""
    if type(value) not in (int, float):
        raise SpecError(f"config.json: {name} = {shown(value)} is not a number")
    try:
        wide = float(value)
    except OverflowError:
        wide = math.inf
    if not math.isfinite(wide):
        raise SpecError(f"config.json: {name} = {shown(value)} is not a finite number")
    return wide


def shown(value: Any) -> str:
    """Return a value's text for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        text = "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
