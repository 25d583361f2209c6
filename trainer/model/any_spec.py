"""The two kinds of `model` sections: keepwarm's own decoder, and causal classes of transformers. Torch-free."""

import json
from collections.abc import Mapping
from typing import Any

from keepwarm.options import validated
from keepwarm.trainer.model.spec import ModelSpec, stored_model_spec
from keepwarm.trainer.model.transformers_spec import TransformersSpec, is_transformers

AnyModelSpec = ModelSpec | TransformersSpec


def validated_model(values: Any, mode: str) -> Any:
    """Return the section that the values are meant for; what is no mapping is returned for pydantic to refuse.

    Raises ValidationError.
    """
    if not isinstance(values, Mapping):
        return values
    return validated(TransformersSpec if is_transformers(values) else ModelSpec, values, mode)


def stored_any_model_spec(fields: Any) -> AnyModelSpec:
    """Return the model section that a manifest, run or export of this or an earlier version holds.

    Raises:
        ValueError: it is none.
    """
    if is_transformers(fields):
        return TransformersSpec.model_validate_json(json.dumps(fields))
    return stored_model_spec(fields)
