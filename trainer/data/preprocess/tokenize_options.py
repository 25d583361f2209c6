"""Input options of `keepwarm data tokenize`: which documents to take, and the text put before each of them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from keepwarm.trainer.data.preprocess.prefix import Control, Prefix, metadata
from keepwarm.trainer.data.preprocess.score import Keep, score_of
from keepwarm.trainer.data.preprocess.text import PART_BYTES, Selection, TextPart, parts, read_lines
from keepwarm.trainer.errors import DataError, SpecError

GOOD_BAD = "<|good|>,<|bad|>"

Inputs = Annotated[list[Path], typer.Option(help="Text file: JSON lines or .txt, plain, .gz or .zst; repeatable.")]
EndOfDocument = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="Token that ends documents; default: the tokenizer's own.")
]
SkipBadLines = Annotated[
    bool, typer.Option("--skip-bad-lines", help="Leave out lines that are no document, and count them.")
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most processes, at least 32 MiB of input each; default: one per 8 cores and 256 MiB of input."
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How to read the input. The tokens depend on all fields except `part_bytes`."""

    text_key: str = "text"
    """Key of the text in each JSON line."""
    keep: Keep | None = None
    """Selects documents by score; None: all."""
    prefix: Prefix | None = None
    """Text put before each document, which carries no loss in training."""
    skip_bad_lines: bool = False
    """Leave out and count lines that are no document, instead of refusing the file."""
    end_of_document: str | int | None = None
    """Text or id of the token that ends a document; None: the tokenizer's own."""
    part_bytes: int = PART_BYTES
    """Bytes of JSON lines to tokenize at a time."""

    @property
    def selection(self) -> Selection:
        return Selection(keep=self.keep, prefix=self.prefix, skip_bad_lines=self.skip_bad_lines)


DEFAULT_OPTIONS = TextOptions()


def keep_from(
    inputs: Sequence[Path], key: str | None, least: float | None, top: float | None, *, skip_bad_lines: bool = False
) -> Keep | None:
    """Return the documents to keep by --score-key, --min-score and --top; --top reads all scores of `inputs`.

    Raises:
        SpecError: the options cannot be combined.
        DataError: an input is missing, or a document has no score.
    """
    if key is None and least is None and top is None:
        return None
    if key is None or (least is None) == (top is None):
        raise SpecError("--score-key requires either --min-score or --top, which in turn require it")
    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    if top is not None:
        every = Selection(keep=Keep(key=key, least=-math.inf), skip_bad_lines=skip_bad_lines)
        least = least_of_top((part for path in inputs for part in parts(path, PART_BYTES, every)), key, top)
    assert least is not None
    return Keep(key=key, least=least)


def prefix_from(template: str | None, key: str | None, least: float, control: str, unmarked: float) -> Prefix | None:
    """Return the prefix of --prefix, or that of --control-key and the options that belong to it.

    Raises:
        SpecError: both are given, the template names no key, or `control` is not two different texts.
    """
    if key is None:
        return None if template is None else metadata(template)
    if template is not None:
        raise SpecError("--prefix and --control-key: a document has one prefix; give one of them")
    good, *bad = control.split(",")
    if len(bad) != 1 or not good or not bad[0] or good == bad[0]:
        raise SpecError(f"--control {control}: give two different texts with a comma between them, as {GOOD_BAD}")
    return Control(key=key, least=least, good=good, bad=bad[0], unmarked=unmarked)


def least_of_top(texts: Iterable[TextPart], key: str, fraction: float) -> float:
    """Return the lowest score among the best `fraction` of all documents, which includes ties.

    Raises:
        DataError: a document has no score, or there are no documents.
    """
    scores = np.fromiter(_scores(texts, key), np.float64)
    if not scores.size:
        raise DataError("there are no documents to score")
    kept = max(1, round(fraction * scores.size))
    return float(np.partition(scores, scores.size - kept)[scores.size - kept])


def _scores(texts: Iterable[TextPart], key: str) -> Iterator[float]:
    def score(document: Any, where: str) -> float:
        if not isinstance(document, dict):
            raise DataError(f"{where}: not an object")
        return score_of(document, key, where)

    for part in texts:
        yield from read_lines(part, score)[0]
