"""Read a model spec from a Hugging Face `config.json` in the dialect of transformers 4 or 5. Torch-free."""

from collections.abc import Mapping
from typing import Any

from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.registry import family_of
from keepwarm.trainer.model.spec import ModelSpec


def model_spec_from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """Return the model spec for a config of a registered family.

    Dropout is ignored: keepwarm has none. A missing field takes the default of transformers.

    Raises:
        SpecError: a value cannot be expressed, or a field that is set is unknown; the message names the field.
    """
    fields = ConfigFields(config)
    family = family_of(fields.need("model_type"), "config.json: model_type =")
    spec = family.read_config(fields)
    fields.finish()
    return ModelSpec(**spec)
