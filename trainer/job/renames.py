"""Renamed keys, values and options. Old names are refused with a sentence that gives the new one. Torch-free."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from keepwarm.trainer.errors import SpecError

KEYS: Mapping[str, str] = {
    "micro_size": "micro_batch_size",
    "global_size": "global_batch_size",
    "silence": "peer_timeout",
    "least_data": "min_data_parallel",
    "hang_floor": "min_hang_timeout",
    "notice": "save_before_limit",
    "busy": "when_busy",
    "stand_in": "proxy_source",
    "law": "distribution",
    "zero_stage": "options.zero_stage",
    "offload_optimizer": "options.offload_optimizer",
    "transformer_engine": "options.transformer_engine",
}
"""Old key of a job file to the key that replaces it: one beside it, or one in a section beside it."""
VALUES: Mapping[str, Mapping[str, str]] = {
    "norm_position": {"before": "pre", "after": "post"},
    "data_mode": {"replicate": "ddp"},
}
"""By key: old value to new value."""
OPTIONS: Mapping[str, str] = {
    "--control-least": "--control-threshold",
    "--at-once": "--max-parallel",
    "coalesce --layers": "coalesce-layers --layers",
}
"""Old command-line option to new option; with its subcommand where another one keeps the option."""


_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "batch": ("micro_size", "global_size"),
    "snapshot": ("silence", "busy"),
    "cluster": ("least_data",),
    "cluster.slurm": ("notice",),
    "health": ("hang_floor",),
    "stages.*.replay": ("stand_in", "law"),
    "stages.*.replay.*": ("stand_in", "law"),
    "parallel": ("zero_stage", "offload_optimizer", "transformer_engine", "data_mode"),
    "model": ("norm_position",),
}
"""Where the old keys and values stand in a job; elsewhere these words may be names of sources and the like."""


_OF_A_SCHEDULE: Mapping[str, tuple[str, ...]] = {
    "constant": ("warmup",),
    "linear": ("warmup", "min"),
    "cosine": ("warmup", "min"),
    "inverse_sqrt": ("warmup", "min"),
    "wsd": ("warmup", "min", "anneal"),
    "infinite": ("warmup", "min", "constant", "cooldown", "cooldown_end", "anneal"),
    "piecewise": ("points",),
}
"""Keys that a schedule used, when a resolved `lr` held the keys of all schedules."""
_OF_AN_ENGINE: Mapping[str, str] = {
    "zero_stage": "deepspeed", "offload_optimizer": "deepspeed", "transformer_engine": "megatron",
}  # fmt: skip
"""Options by the engine that used them, when a resolved `parallel` held those of all engines."""


def upgrade(values: Any) -> None:
    """Rename, in place, old keys and values in the resolved spec of an older version; drop those that had no effect."""
    for curve in _found(values, ["stages", "*", "lr"]):
        if all(key in curve for key in _OF_A_SCHEDULE["infinite"]) and "points" in curve:
            used = {"schedule", "max", *_OF_A_SCHEDULE.get(str(curve.get("schedule")), curve)}
            for key in [key for key in curve if key not in used]:
                del curve[key]
    for parallel in _found(values, ["parallel"]):
        if all(key in parallel for key in _OF_AN_ENGINE):
            for key in [key for key, engine in _OF_AN_ENGINE.items() if engine != parallel.get("engine")]:
                del parallel[key]
    for section, keys in _SECTIONS.items():
        for found in _found(values, section.split(".")):
            for key in keys:
                if key in VALUES and isinstance(found.get(key), str):
                    found[key] = VALUES[key].get(found[key], found[key])
                if key in KEYS and key in found:
                    *parents, new = KEYS[key].split(".")
                    target = found
                    for parent in parents:
                        target = target.setdefault(parent, {})
                    if isinstance(target, dict):
                        target.setdefault(new, found.pop(key))


def _found(values: Any, path: list[str]) -> Iterator[dict[str, Any]]:
    if not path:
        if isinstance(values, dict):
            yield values
    elif path[0] != "*":
        yield from _found(values.get(path[0]), path[1:]) if isinstance(values, dict) else ()
    elif isinstance(values, list):
        for inner in values:
            yield from _found(inner, path[1:])


def new_key(old: str, known: Iterable[str]) -> str | None:
    """Return the new name of key `old`, if it is among the `known` keys of the section."""
    new = KEYS.get(old)
    return new if new is not None and new.partition(".")[0] in known else None


def has_old_key(new: str, values: Any) -> bool:
    """Return whether a section uses the old name of key `new`, whose absence is then reported as well."""
    return isinstance(values, dict) and any(KEYS.get(key) == new for key in values)


def refuse_old_options(arguments: Sequence[str]) -> None:
    """Raise SpecError if an argument is a renamed option; the message gives the new name.

    The first argument may be a subcommand.
    """
    for argument in arguments:
        option = argument.partition("=")[0]
        for old in (option, f"{arguments[0]} {option}"):
            if old in OPTIONS:
                raise SpecError(f"{old} was renamed: write {OPTIONS[old]}")
