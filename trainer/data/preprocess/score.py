"""Scores of documents in JSON lines, and the selection of documents by score. Torch-free.

A high-quality subset, used for several epochs, is one of the remedies for the stability gap (Guo et al., 2024).
"""

import math
from typing import Any

import msgspec

from keepwarm.foreign_json import shown_keys
from keepwarm.trainer.errors import DataError


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """Selects documents with a high enough score."""

    key: str
    """Key of the score in each JSON line."""
    least: float
    """Minimum score to keep."""


def score_of(document: dict[str, Any], key: str, where: str, option: str = "--score-key") -> float:
    """Return the score of a document; raises DataError, naming the line, if there is none."""
    value = document.get(key)
    try:
        score = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # An integer beyond every float.
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{where}: no number at {key!r} ({option}); its keys are {shown_keys(document)}")
    return score
