"""Fields of a Hugging Face `config.json`; each must be used, known to be harmless, or off. Torch-free."""

from collections.abc import Iterator, Mapping
from typing import Any

from keepwarm.trainer.errors import SpecError

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
"""Fields that do not affect what the model computes."""


class ConfigFields:
    """A config.json from which a model family takes its fields; `finish` rejects fields that are set but not taken."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
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

    def choose(self, name: str, default: str, known: Mapping[str, str]) -> str:
        """Return the translation of a field's value. Raise `SpecError` if it is not in `known`."""
        value = self.take(name, default)
        if value not in known:
            raise SpecError(f"config.json: {name} = {value!r} is not supported, only {', '.join(sorted(known))}")
        return known[value]

    def require(self, name: str, value: Any) -> None:
        """Raise `SpecError` if a field is set to anything but `value`."""
        if self.take(name, value) != value:
            raise SpecError(f"config.json: {name} = {self._config[name]!r} is not supported, only {value!r}")

    def harmless(self, *names: str) -> None:
        """Accept any value of fields that do not change what the model computes here."""
        self._used.update(names)

    def finish(self) -> None:
        """Raise `SpecError` if a field is set but was never used."""
        for name in sorted(set(self._config) - self._used - GENERIC):
            if self._config[name]:
                raise SpecError(f"config.json: {name} = {self._config[name]!r} is not understood")
