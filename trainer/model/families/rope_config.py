"""Rotary embeddings in a config.json: separate fields in transformers 4, `rope_parameters` in 5. Torch-free."""

from typing import Any

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields


def read_rope(config: ConfigFields, *, theta: str = "rope_theta", fraction: str | None = None) -> dict[str, Any]:
    """Return the spec's rotary fields; `theta` and `fraction` are the field names in transformers 4.

    Raise `SpecError` if the frequencies are scaled, or if part of a head rotates and the class has no `fraction`.
    """
    rope = config.table("rope_parameters")
    for name in ("rope_parameters", "rope_scaling"):
        scaling = config.table(name)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise SpecError(f"config.json: {name}.rope_type = {kind!r} is not supported, only 'default'")
    unknown = sorted(set(rope) - {"rope_theta", "rope_type", "type", "partial_rotary_factor"})
    if unknown:
        raise SpecError(f"config.json: rope_parameters.{unknown[0]} is not understood")
    if fraction is None and rope.get("partial_rotary_factor", 1.0) != 1.0:
        # These classes read it only for other kinds of RoPE.
        raise SpecError("config.json: rope_parameters.partial_rotary_factor is not supported for this model_type")
    old_fraction = 1.0 if fraction is None else config.take(fraction, 0.25)
    return {
        "rope_theta": float(rope.get("rope_theta", config.take(theta, 10000.0))),
        "rotary_fraction": float(rope.get("partial_rotary_factor", old_fraction)),
    }


def add_rope(config: Config, *, old: Config, parameters: Config) -> Config:
    """Return `config` with the rotary fields of both dialects; existing fields are kept."""
    made = {**old, **config}
    if config.get("rope_parameters") is None:
        made["rope_parameters"] = {"rope_type": "default", **parameters}
    return made
