"""Renamed keys, values and options. Old names are refused with a sentence that gives the new one. Torch-free."""

from collections.abc import Iterable, Mapping
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
OPTIONS: Mapping[str, str] = {"--control-least": "--control-threshold", "--at-once": "--max-parallel"}
"""Old command-line option to new option."""


def new_key(old: str, known: Iterable[str]) -> str | None:
    """Return the new name of key `old`, if it is among the `known` keys of the section."""
    new = KEYS.get(old)
    return new if new is not None and new.partition(".")[0] in known else None


def has_old_key(new: str, values: Any) -> bool:
    """Return whether a section uses the old name of key `new`, whose absence is then reported as well."""
    return isinstance(values, dict) and any(KEYS.get(key) == new for key in values)


def refuse_old_options(arguments: Iterable[str]) -> None:
    """Raise SpecError if an argument is a renamed option; the message gives the new name."""
    for argument in arguments:
        option = argument.partition("=")[0]
        if option in OPTIONS:
            raise SpecError(f"{option} was renamed: write {OPTIONS[option]}")
