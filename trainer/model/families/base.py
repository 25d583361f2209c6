"""The interface of a model family: a Hugging Face architecture expressed as a model spec. Torch-free."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.config_fields import ConfigFields, shown
from keepwarm.trainer.model.families.tensor_names import TensorNames
from keepwarm.trainer.model.spec import MOST_LAYERS, InitSpec, ModelSpec

Config = dict[str, Any]
"""The contents of a `config.json`."""

PLAIN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Activations of an MLP without a gate: Hugging Face name to keepwarm name."""


class ModelFamily(ABC):
    """The way Hugging Face describes and stores models of one architecture.

    A family adds no computation: it translates to and from the fields of `ModelSpec`, which engines, estimates and
    other formats rely on.

    model_type  `model_type` in config.json; the name under which the family is registered
    class_name  the class that loads an export, for `architectures` in config.json
    tensors     names and layout of the tensors
    """

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    tensors: ClassVar[TensorNames]

    @abstractmethod
    def read_config(self, config: ConfigFields) -> dict[str, Any]:
        """Return the fields of the model spec that `config` describes.

        A missing field takes the default of transformers. Raise `SpecError` if a value cannot be expressed.
        """

    @abstractmethod
    def write_config(self, spec: ModelSpec) -> Config:
        """Return the config of a model, without `model_type` and `architectures`.

        Settings that the family cannot express may be left out: the caller reads the config back and rejects it if it
        describes another model.
        """

    def in_both_dialects(self, config: Config, spec: ModelSpec) -> Config:
        """Return `config`, adding each field that only transformers 4 or only 5 reads from its counterpart."""
        return config


def read_shared(config: ConfigFields, *, tied: bool) -> dict[str, Any]:
    """Return the spec fields that every class has; `tied` is the class's default for tied embeddings."""
    return {
        "vocabulary_size": config.integer("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", tied),
        # Zero means nothing to a model that has weights.
        "init": InitSpec(std=config.number("initializer_range", 0.02) or 0.02),
    }


def write_shared(spec: ModelSpec) -> Config:
    """Return the config fields that every class has."""
    return {
        "vocab_size": spec.vocabulary_size,
        "tie_word_embeddings": spec.tied_embeddings,
        "initializer_range": spec.init.std,
        "use_cache": True,
        # The defaults are Llama's own ids, which mean nothing in another vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def read_sizes(config: ConfigFields) -> dict[str, Any]:
    """Return the sizes for the spec from the field names that all classes since GPT-NeoX share.

    Raise `SpecError` if one is missing or is no size.
    """
    layers = config.integer("num_hidden_layers")
    if not 0 < layers <= MOST_LAYERS:
        raise SpecError(f"config.json: num_hidden_layers = {shown(layers)} is no number of layers")
    return {
        "layers": layers,
        "hidden_size": config.integer("hidden_size"),
        "heads": config.integer("num_attention_heads"),
        "ffn_size": config.integer("intermediate_size"),
        "max_sequence_length": config.integer("max_position_embeddings"),
    }


def write_sizes(spec: ModelSpec) -> Config:
    """Return the config fields that `read_sizes` reads."""
    return {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.ffn_size,
        "max_position_embeddings": spec.max_sequence_length,
    }


def plain_activation(spec: ModelSpec) -> str:
    """Return Hugging Face's name for the activation of an MLP without a gate."""
    return "gelu_new" if spec.activation == "gelu_tanh" else "gelu"
