"""Text placed before each document, which the model sees but which carries no loss. Torch-free.

Two kinds: metadata (MeCo, Gao et al., 2025: the URL for most of training, plain text for the last tenth), and control
tokens chosen by a score (Korbak et al., 2023), with which generation then starts.
"""

import string
from typing import Any

import msgspec
import xxhash

from keepwarm.foreign_json import shown_keys
from keepwarm.trainer.data.preprocess.score import score_of
from keepwarm.trainer.errors import DataError, SpecError


class Metadata(msgspec.Struct, frozen=True, kw_only=True, tag="metadata"):
    """Fields of the JSON line, inserted into a template."""

    template: str
    """Such as `URL: {url}` and two newlines."""


class Control(msgspec.Struct, frozen=True, kw_only=True, tag="control"):
    """One of two texts, chosen by the document's score."""

    key: str
    """Key of the score in each JSON line."""
    least: float
    """Minimum score of a good document."""
    good: str
    bad: str
    unmarked: float
    """Fraction of the documents that get neither text, so that the model also learns unmarked text."""


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
    """Return the text before a document; empty if it gets none.

    Raises:
        DataError: the document lacks a field that the prefix needs; names the line.
    """
    if isinstance(prefix, Control):
        good = score_of(document, prefix.key, where, option="--control-key") >= prefix.least
        # Depends on the text alone: the same documents are unmarked wherever and in whatever parts they are processed.
        drawn = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) / 2**64
        return "" if drawn < prefix.unmarked else prefix.good if good else prefix.bad
    values = {field: document.get(field) for field in fields_of(prefix.template)}
    for field, value in values.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{where}: no text or number at {field!r} (--prefix); its keys are {shown_keys(document)}")
    try:
        return prefix.template.format_map(values)
    except ValueError as error:  # A format that does not fit the value, such as `{url:d}`.
        raise DataError(f"{where}: does not fit into --prefix {prefix.template!r}: {error}") from None
