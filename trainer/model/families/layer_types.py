"""Which layers have a sliding window, in a config.json. Torch-free."""

from collections.abc import Sequence
from typing import Any

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields, shown
from keepwarm.trainer.model.spec import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(config: ConfigFields, layers: int) -> list[str] | None:
    """Return the type of every layer if the config lists them. Raise `SpecError` for other types or another number."""
    types = config.take("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or not all(kind in (FULL, SLIDING) for kind in types):
        raise SpecError(f"config.json: layer_types = {shown(types)} is not supported, only a list of {FULL}, {SLIDING}")
    if len(types) != layers:
        raise SpecError(f"config.json: layer_types has {len(types)} layers, num_hidden_layers says {layers}")
    return types


def windows(types: Sequence[str], window: Any) -> dict[str, Any]:
    """Return the spec's window and the layers without it. Raise `SpecError` if it is needed and missing."""
    if SLIDING not in types:
        return {"sliding_window": None}
    if type(window) is not int:
        raise SpecError(f"config.json: sliding_window = {shown(window)} is not a whole number, layer_types need one")
    full = tuple(index for index, kind in enumerate(types) if kind == FULL)
    return {"sliding_window": window, "full_attention_layers": full}


def write_layer_types(spec: ModelSpec) -> Config:
    """Return the config fields that `windows` was read from."""
    types = [FULL if spec.window(layer) is None else SLIDING for layer in range(spec.layers)]
    return {"sliding_window": spec.sliding_window, "layer_types": types}
