"""The model spec behind a Hugging Face `config.json`, in the dialects of transformers 4 and 5. Torch-free."""

from collections.abc import Mapping
from typing import Any

from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.registry import family_of
from keepwarm.trainer.model.spec import ModelSpec


def model_spec_from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of a model of a registered family.

    Dropout is ignored: there is none here. A field left out has the default of transformers.

    Raises:
        SpecError: naming the field, when a value cannot be expressed or a field that is set is not known.
    """
    fields = ConfigFields(config)
    family = family_of(fields.need("model_type"), "config.json: model_type =")
    spec = family.read_config(fields)
    fields.finish()
    return ModelSpec(**spec)
