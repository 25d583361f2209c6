"""A score in each document of JSON lines, and the documents that are good enough by it. Torch-free.

A high-quality subset, gone through several times, is one of the remedies against the stability gap (Guo et al., 2024).
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.data.text import TextPart


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


def least_of_top(texts: Iterable["TextPart"], key: str, fraction: float) -> float:
    """The lowest score among the best `fraction` of all documents; those that tie with it belong to them.

    Raises:
        DataError: a document has no score, or there is none.
    """
    scores = np.fromiter(_scores(texts, key), np.float64)
    if not scores.size:
        raise DataError("there are no documents to score")
    kept = max(1, round(fraction * scores.size))
    return float(np.partition(scores, scores.size - kept)[scores.size - kept])


def _scores(texts: Iterable["TextPart"], key: str) -> Iterator[float]:
    for part in texts:
        for number, line in enumerate(part.payload.split(b"\n"), part.first_line):
            if line.strip():
                where = f"{part.path}:{number}"
                try:
                    document = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where}: not JSON: {error}") from None
                if not isinstance(document, dict):
                    raise DataError(f"{where}: not an object")
                yield score_of(document, key, where)
