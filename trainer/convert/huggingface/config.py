"""The config.json of an export: its parent's own where there is one, else made from the model spec. Torch-free."""

from collections.abc import Collection, Mapping
from typing import Any

from keepwarm.trainer.convert.dtypes import NAMES
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import Config, ModelFamily
from keepwarm.trainer.model.families.registry import FAMILIES, family_of
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from keepwarm.trainer.model.spec import ModelSpec

_TRAINING_ONLY = {"init", "z_loss"}


def computes(spec: ModelSpec) -> Config:
    """What of a spec changes the result of a forward pass, in one form: equal for models that compute the same."""
    fields = spec.model_dump(exclude=_TRAINING_ONLY)
    fields |= {"kv_heads": spec.key_value_heads, "head_dim": spec.size_per_head}
    if spec.position == "learned":
        fields |= {"rope_theta": None, "rotary_fraction": None}
    return fields | {"rope_scaling": _scaling(spec)}


def _scaling(spec: ModelSpec) -> Config | None:
    """Return what of the scaled frequencies has an effect: fields of other types have none."""
    scaling = spec.rope_scaling
    if scaling is None:
        return None
    by_type = {
        "llama3": ("low_frequency_factor", "high_frequency_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate"),
        "longrope": ("short_factors", "long_factors"),
    }
    names = ("type", "factor", *by_type.get(scaling.type, ()))
    return {
        **{name: getattr(scaling, name) for name in names},
        "layers": "all" if spec.sliding_window is None else scaling.layers,
        "original": None if scaling.type == "linear" else spec.original_length,
        "attention_factor": spec.attention_factor,
    }


def config_for(spec: ModelSpec, model_type: str | None = None) -> Config:
    """A config whose class computes what `spec` does: of `model_type`, or of the first type that can.

    Raises:
        SpecError: none can; names the field.
    """
    misfits = []
    for family in [family_of(model_type)] if model_type else _usable():
        kind = family.model_type
        made = {"architectures": [family.class_name], "model_type": kind, **family.write_config(spec)}
        config = in_both_dialects(made, spec)
        misfit = _misfit(config, spec)
        if misfit is None:
            return config
        misfits.append((len(misfit), kind, misfit))
    _, kind, misfit = min(misfits)
    raise SpecError(f"model.{misfit[0]} = {getattr(spec, misfit[0])!r} cannot be expressed by a model of type {kind}")


def _usable() -> list[ModelFamily]:
    """Return all families; a broken one of another package must not keep the others from being tried."""
    return [family() for name, family in FAMILIES.usable() if family.model_type == name]


def in_both_dialects(config: Mapping[str, Any], spec: ModelSpec) -> Config:
    """Return a config with the fields that only transformers 4 or only 5 reads added from their twins."""
    made = dict(config)
    for name, twin in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        if made.get(name) is not None:
            made.setdefault(twin, made[name])
    return family_of(made["model_type"]).in_both_dialects(made, spec)


def with_dtype(config: Mapping[str, Any], dtype: str) -> Config:
    """With the dtype of the weights, in every dialect that the config speaks."""
    fields = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype", "torch_dtype"]
    return {**config, **dict.fromkeys(fields, NAMES[dtype])}


def fits(config: Mapping[str, Any], spec: ModelSpec, ignored: Collection[str] = ()) -> bool:
    """Whether a config describes a model that computes what `spec` does; `ignored` fields change nothing."""
    return _misfit(config, spec, ignored) is None


def _misfit(config: Mapping[str, Any], spec: ModelSpec, ignored: Collection[str] = ()) -> list[str] | None:
    there, here = computes(model_spec_from_hf_config(config, ignored)), computes(spec)
    return [name for name in here if there[name] != here[name]] or None
