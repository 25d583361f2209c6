"""Causal classes of transformers, built on the meta device from the content of a config.json."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.transformers.attention import IMPLEMENTATION, register
from keepwarm.trainer.model.transformers.composite import text_of
from keepwarm.trainer.model.transformers.given import GivenNumbers, note_given


def build(content: Mapping[str, Any]) -> PreTrainedModel:
    """Return the causal model that a config describes, with parameters and buffers on the meta device.

    Raises:
        SpecError: transformers has no such class, or the class does not build.
    """
    # It would warn of special tokens outside the vocabulary, which mean nothing to training.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    content = text_of(content)
    config, kind = _config(content), str(content["model_type"])
    register()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SpecError(f"model_type {kind!r} is no causal language model of transformers")
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        raise SpecError(
            f"{cls.__name__} has layers of linear attention, in which transformers keeps documents apart only with "
            "kernels for GPUs"
        )
    if not cls._supports_attention_backend:
        raise SpecError(f"{cls.__name__} computes its attention itself, so that documents cannot be kept apart in it")
    config._attn_implementation = IMPLEMENTATION
    config.use_cache = False
    # Some modules would be made in the dtype of the published weights.
    config.dtype = torch.float32
    for name, value in vars(config).items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)
    try:
        with torch.device("meta"), GivenNumbers():
            model: PreTrainedModel = cls(config).train()
    except Exception as error:  # whatever a class says of a config that contradicts itself
        raise SpecError(f"{cls.__name__} does not build from this config: {_line(error)}") from error
    note_given(model)
    return model


def _config(content: Mapping[str, Any]) -> PreTrainedConfig:
    kind = str(content["model_type"])
    if kind not in CONFIG_MAPPING:
        raise SpecError(f"model_type {kind!r} is unknown to the transformers that is installed")
    try:
        made: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(dict(content))
    except Exception as error:
        raise SpecError(f"transformers refuses this config: {_line(error)}") from error
    return made


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
