"""Rotary embeddings in a config.json: separate fields in transformers 4, `rope_parameters` in 5. Torch-free."""

import math
from collections.abc import Mapping
from typing import Any

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields, finite, shown
from keepwarm.trainer.model.spec import ModelSpec, RopeScalingSpec

_FIELDS = {
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
    "attention_factor": "attention_factor",
}
"""Their name to ours."""
_READ: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
}
"""By type of scaling: further fields that change its frequencies; transformers ignores those of other types."""
_KNOWN = {
    *_FIELDS, "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "mscale", "mscale_all_dim", "truncate", "finetuned",
}  # fmt: skip
BY_LAYER = ("full_attention", "sliding_attention")
"""Keys of `rope_parameters` where layers with and without a window differ."""


def read_rope(
    config: ConfigFields,
    *,
    theta: str = "rope_theta",
    fraction: str | None = None,
    default_theta: float = 10000.0,
) -> dict[str, Any]:
    """Return the spec's rotary fields; `theta` and `fraction` are the field names in transformers 4.

    Raise `SpecError` if a value cannot be expressed, if the two dialects contradict each other, or if part of a head
    rotates and the class has no `fraction`.
    """
    old_theta = config.number(theta, default_theta)
    old_fraction = config.number(fraction or "partial_rotary_factor", 0.25 if fraction else 1.0)
    context = config.take("max_position_embeddings")
    found = []
    for name in ("rope_scaling", "rope_parameters"):
        table = config.table(name)
        if table:
            base = _number(table, "rope_theta", name, old_theta)
            part = _number(table, "partial_rotary_factor", name, old_fraction)
            found.append({"rope_theta": base, "rotary_fraction": part, "rope_scaling": _scaling(table, name, context)})
    if len(found) == 2 and found[0] != found[1]:
        raise SpecError("config.json: rope_scaling and rope_parameters contradict each other")
    plain = {"rope_theta": old_theta, "rotary_fraction": old_fraction, "rope_scaling": None}
    rope = found[0] if found else plain
    if fraction is None and rope["rotary_fraction"] != 1.0:
        raise SpecError("config.json: partial_rotary_factor is not supported for this model_type")
    return rope


def read_rope_by_layer(config: ConfigFields, *, default_theta: float) -> dict[str, Any]:
    """Return the spec's rotary fields for a class whose layers with a window never scale theirs (OLMo 3).

    Raise `SpecError` if a value cannot be expressed.
    """
    theta, context = config.number("rope_theta", default_theta), config.take("max_position_embeddings")
    tables, old = config.table("rope_parameters"), config.table("rope_scaling")
    unknown = sorted(set(tables) - set(BY_LAYER))
    if unknown:
        raise SpecError(f"config.json: rope_parameters.{unknown[0]} is not by type of layer, as this model_type has it")
    for kind in BY_LAYER:
        if not isinstance(tables.get(kind) or {}, dict):
            raise SpecError(f"config.json: rope_parameters.{kind} = {shown(tables[kind])} is not an object")
    full, windowed = (dict(tables.get(kind) or {}) for kind in BY_LAYER)
    names = [f"rope_parameters.{kind}" for kind in BY_LAYER]
    bases = []
    for table, name in zip((full | old, windowed), names, strict=True):
        bases.append(_number(table, "rope_theta", name, theta))
        if _number(table, "partial_rotary_factor", name, 1.0) != 1.0:
            raise SpecError("config.json: partial_rotary_factor is not supported for this model_type")
    if bases[0] != bases[1] or _scaling(windowed, names[1], context) is not None:
        raise SpecError(f"config.json: {names[1]} = {shown(windowed)} is not supported beside {shown(full | old)}")
    scaling = _scaling(full | old, "rope_scaling" if old else names[0], context)
    if scaling is not None:
        scaling = scaling.model_copy(update={"layers": "full_attention"})
    return {"rope_theta": bases[0], "rope_scaling": scaling}


def write_scaling(spec: ModelSpec) -> Config:
    """Return the type of RoPE with its settings, as both dialects name them."""
    scaling = spec.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    made: Config = {"rope_type": scaling.type, "factor": scaling.factor}
    for theirs in _READ[scaling.type]:
        value = getattr(scaling, _FIELDS[theirs])
        if value is not None:
            made[theirs] = list(value) if isinstance(value, tuple) else value
    if scaling.type in ("llama3", "yarn", "longrope"):
        made["original_max_position_embeddings"] = spec.original_length
    if scaling.type == "yarn" and not scaling.truncate:
        made["truncate"] = False
    return made


def add_rope(config: Config, spec: ModelSpec, *, old: Config, parameters: Config) -> Config:
    """Return `config` with the rotary fields of both dialects; existing fields are kept, and the others follow them."""
    made, scaling = {**old, **config}, config.get("rope_scaling") or config.get("rope_parameters")
    settings = write_scaling(spec) if scaling is None else settings_of(scaling)
    if spec.rope_scaling is not None and config.get("rope_scaling") is None:
        made["rope_scaling"] = {name: value for name, value in settings.items() if name not in parameters}
    if config.get("rope_parameters") is None:
        made["rope_parameters"] = {**settings, **parameters}
    return made


def settings_of(table: Config) -> Config:
    """Return a table of either dialect with the name that both have for the type of RoPE."""
    return {"rope_type": table.get("rope_type") or table.get("type") or "default", **table}


def _scaling(table: Mapping[str, Any], where: str, context: Any) -> RopeScalingSpec | None:
    """Return how one table scales frequencies, or None; `context` is the model's maximum length."""
    kind = table.get("rope_type") or table.get("type") or "default"
    unknown = sorted(name for name in set(table) - _KNOWN if table[name])
    if unknown:
        raise SpecError(f"config.json: {where}.{unknown[0]} is not understood")
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _READ:
        raise SpecError(f"config.json: {where}.rope_type = {shown(kind)} is not supported, only {', '.join(_READ)}")
    original = table.get("original_max_position_embeddings")
    if kind in ("linear", "dynamic") or original is None:
        original = context
    if type(original) is not int or type(context) is not int or original < 2:
        raise SpecError(f"config.json: {where}.original_max_position_embeddings = {shown(original)} is not a context")
    factor = _factor(table, where, kind, context / original)
    fields: dict[str, Any] = {}
    for theirs in _READ[kind]:
        value = table.get(theirs)
        if isinstance(value, list):
            fields[_FIELDS[theirs]] = tuple(finite(part, f"{where}.{theirs}") for part in value)
        elif value is not None:
            fields[_FIELDS[theirs]] = finite(value, f"{where}.{theirs}")
    if kind == "llama3" and len(fields) < 2:
        raise SpecError(f"config.json: {where} needs low_freq_factor and high_freq_factor")
    if kind == "yarn":
        fields |= _yarn(table, where, factor)
    return RopeScalingSpec(**fields | {"type": kind, "factor": factor, "original_max_sequence_length": original})


def _factor(table: Mapping[str, Any], where: str, kind: str, growth: float) -> float:
    """Return by how much the context grows; yarn and longrope derive it from both lengths if it is missing."""
    given = table.get("factor")
    if given is not None:
        return finite(given, f"{where}.factor")
    if kind in ("yarn", "longrope"):
        return max(growth, 1.0)
    raise SpecError(f"config.json: {where}.factor is missing")


def _yarn(table: Mapping[str, Any], where: str, factor: float) -> dict[str, Any]:
    """Return the fields of yarn that have several spellings (DeepSeek's `mscale`) or a type of their own."""
    truncate = table.get("truncate", True)
    if not isinstance(truncate, bool):
        raise SpecError(f"config.json: {where}.truncate = {shown(truncate)} is neither true nor false")
    over, under = (finite(table.get(name) or 0, f"{where}.{name}") for name in ("mscale", "mscale_all_dim"))
    if table.get("attention_factor") is not None or not (over and under):
        return {"truncate": truncate}
    warmth = [0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0 for scale in (over, under)]
    return {"truncate": truncate, "attention_factor": warmth[0] / warmth[1]}


def _number(table: Mapping[str, Any], name: str, where: str, default: float) -> float:
    value = table.get(name)
    return default if value is None else finite(value, f"{where}.{name}")
