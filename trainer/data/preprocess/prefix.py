"""Text put before each document that says something of it, is seen, and carries no loss. Torch-free.

Two kinds: metadata (MeCo, Gao et al., 2025: the URL for most of training, plain text for the last tenth), and control
tokens chosen by a score (Korbak et al., 2023), with which generation then begins.
"""

import string
from typing import Any

import msgspec
import xxhash

from keepwarm.trainer.data.preprocess.score import score_of
from keepwarm.trainer.errors import DataError, SpecError


class Metadata(msgspec.Struct, frozen=True, kw_only=True, tag="metadata"):
    """Fields of the JSON line, set into a text."""

    template: str
    """As `URL: {url}` and two line ends."""


class Control(msgspec.Struct, frozen=True, kw_only=True, tag="control"):
    """One of two texts, by the document's score."""

    key: str
    """Of the score in each JSON line."""
    least: float
    """The lowest score that is good."""
    good: str
    bad: str
    unmarked: float
    """Fraction of the documents that get neither, so that the model also knows text without."""


Prefix = Metadata | Control


def metadata(template: str) -> Metadata:
    """Metadata as it is written on a command line, where \\n stands for the end of a line.

    Raises:
        SpecError: braces that do not name a field.
    """
    try:
        fields = fields_of(template)
    except ValueError as error:
        raise SpecError(f"--prefix {template!r}: {error}") from None
    if not fields or not all(field.isidentifier() for field in fields):
        raise SpecError(f"--prefix {template!r}: name at least one key of the JSON lines in braces, as 'URL: {{url}}'")
    return Metadata(template=template.replace("\\n", "\n"))


def fields_of(template: str) -> list[str]:
    """What stands in braces."""
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


def prefix_of(document: dict[str, Any], text: str, prefix: Prefix, where: str) -> str:
    """The text before a document; empty for one that gets none.

    Raises:
        DataError: the document lacks what the prefix is made of; names the line.
    """
    if isinstance(prefix, Control):
        good = score_of(document, prefix.key, where, option="--control-key") >= prefix.least
        # By the text alone: the same documents are unmarked however the work is cut and wherever it runs.
        drawn = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) / 2**64
        return "" if drawn < prefix.unmarked else prefix.good if good else prefix.bad
    values = {field: document.get(field) for field in fields_of(prefix.template)}
    for field, value in values.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{where}: no text or number at {field!r} (--prefix); its keys are {sorted(document)}")
    return prefix.template.format_map(values)
