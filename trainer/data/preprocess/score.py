"""A score in each document of JSON lines, and the documents that are good enough by it. Torch-free.

A high-quality subset, gone through several times, is one of the remedies against the stability gap (Guo et al., 2024).
"""

import math
from typing import Any

import msgspec

from keepwarm.trainer.errors import DataError


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """Documents whose score is high enough."""

    key: str
    """Of the score in each JSON line."""
    least: float
    """The lowest score that is kept."""


def score_of(document: dict[str, Any], key: str, where: str, option: str = "--score-key") -> float:
    """The score of a document; raises DataError, naming the line, where it has none."""
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: no number at {key!r} ({option}); its keys are {sorted(document)}")
    return float(value)
