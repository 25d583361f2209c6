"""Read a model spec from a Hugging Face `config.json` in the dialect of transformers 4 or 5. Torch-free."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.config_fields import ConfigFields, shown
from keepwarm.trainer.model.families.registry import family_of
from keepwarm.trainer.model.spec import ModelSpec


def model_spec_from_hf_config(config: Mapping[str, Any], ignored: Collection[str] = ()) -> ModelSpec:
    """Return the model spec for a config of a registered family; see `read_hf_config`."""
    return read_hf_config(config, ignored)[0]


def read_hf_config(config: Mapping[str, Any], ignored: Collection[str] = ()) -> tuple[ModelSpec, list[str]]:
    """Return the model spec for a config of a registered family, and the fields that were passed over.

    Dropout is ignored: keepwarm has none. A missing field takes the default of transformers. `ignored` are fields that
    the user declares harmless.

    Raises:
        SpecError: a value cannot be expressed, or a field may change the computation; the message names the field.
    """
    fields = ConfigFields(config, ignored)
    model_type = fields.need("model_type")
    if not isinstance(model_type, str):
        raise SpecError(f"config.json: model_type = {shown(model_type)} is not a name")
    family = family_of(model_type, "config.json: model_type =")
    try:
        spec = ModelSpec(**family.read_config(fields))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "model"
        got = f", got {shown(first['input'])}" if first["loc"] else ""
        raise SpecError(f"config.json: {where}: {first['msg']}{got}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A family of another package need not check every type.
        raise SpecError(
            f"config.json: a value is of another kind than {model_type} has: {shown(str(error))}"
        ) from error
    return spec, fields.finish()
