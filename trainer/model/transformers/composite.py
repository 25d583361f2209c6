"""Configs of several models, of which one is a text decoder (`*ForConditionalGeneration`). Torch-free."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

TEXT = "text_config"
_INHERITED = ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")


class Layout(NamedTuple):
    """Where such a folder has the tensors of its text decoder."""

    base: str
    head: str

    def plain(self, name: str) -> str | None:
        """Return the name of a tensor in a folder of the text decoder alone; None if it belongs to another model."""
        if name.startswith(self.base):
            return "model." + name.removeprefix(self.base)
        return "lm_head." + name.removeprefix(self.head) if name.startswith(self.head) else None

    def placed(self, plain: str) -> str:
        """Return the inverse of `plain`."""
        if plain.startswith("lm_head."):
            return self.head + plain.removeprefix("lm_head.")
        return self.base + plain.removeprefix("model.")


LAYOUTS = (
    Layout("language_model.model.", "language_model.lm_head."),
    Layout("model.language_model.", "lm_head."),
)
"""As published first, and as the classes of transformers 5 name them."""


def is_composite(config: Mapping[str, Any]) -> bool:
    """Return whether a config is one of several models."""
    return isinstance(config.get(TEXT), Mapping)


def text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text decoder, which is the config itself unless there are several models."""
    if not is_composite(config):
        return dict(config)
    return {name: config[name] for name in _INHERITED if name in config} | dict(config[TEXT])


def layout_of(names: Iterable[str]) -> Layout | None:
    """Return the layout of a folder with tensors of these names, or None."""
    found = set(names)
    return next((layout for layout in LAYOUTS if layout.placed("model.embed_tokens.weight") in found), None)
