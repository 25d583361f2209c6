"""Which token of a `tokenizer.json` ends a document. Torch-free.

The answer is one function of the vocabulary and of what the files beside it declare, so that every command that reads
a tokenizer finds the same token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.foreign_json import parse_json
from keepwarm.trainer.errors import DataError

KNOWN_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
)
"""Names of end-of-document tokens, asked only if no file declares one."""

OPTION = "name it with --end-of-document, in a job with data.end_of_document"
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_MODEL_FILES = ("generation_config.json", "config.json")
_BOUNDARIES = ("bos_token", "eos_token", "cls_token", "sep_token", "mask_token")
_FILE_LIMIT = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What the files beside a `tokenizer.json` say about its tokens."""

    ends: Mapping[str, str]
    """The `eos_token` by file, of the files that describe the tokenizer."""
    boundaries: frozenset[str]
    """Every token that those files name as a boundary or a mask."""
    end_ids: Mapping[str, frozenset[int]]
    """The `eos_token_id` by file, of the files that describe the model."""


def declared_beside(path: Path) -> Declared:
    """Read what the files beside a `tokenizer.json` declare.

    Raises:
        DataError: one of them is not a JSON object.
    """
    ends: dict[str, str] = {}
    boundaries: set[str] = set()
    for name in _TOKENIZER_FILES:
        fields = _fields(path.with_name(name))
        named = {key: token for key in _BOUNDARIES if (token := _content(fields.get(key))) is not None}
        boundaries |= set(named.values())
        if "eos_token" in named:
            ends[name] = named["eos_token"]
    ids = {name: _ids(_fields(path.with_name(name)).get("eos_token_id")) for name in _MODEL_FILES}
    return Declared(
        ends=ends, boundaries=frozenset(boundaries), end_ids={name: found for name, found in ids.items() if found}
    )


def choose_end_of_document(
    path: Path, vocabulary: Mapping[str, int], special: frozenset[int], declared: Declared, named: str | int | None
) -> int:
    """Return the id of the token that ends a document.

    In this order: the one that is `named`, by its text or id; the `eos_token` that the tokenizer's files declare; the
    `eos_token_id` of the model's files, if it is a special token; a special token with a known name; and, only where
    there is none, an ordinary entry with a known name.

    Raises:
        DataError: there is no such token, or more than one; names the candidates and the option that decides.
    """
    if named is not None:
        return _named(path, vocabulary, named)
    if declared.ends:
        return _declared(path, vocabulary, declared.ends)
    texts = {id: token for token, id in vocabulary.items()}
    known = [vocabulary[name] for name in KNOWN_NAMES if name in vocabulary]
    known_special = [id for id in known if id in special]
    for file, ids in declared.end_ids.items():
        # Configs hold defaults that no one chose: an id that is no special token says nothing.
        usable = sorted(ids & special)
        if len(usable) > 1:
            usable = [id for id in usable if id in known_special] or usable
        if usable:
            return _only(f"{path.with_name(file)}: eos_token_id is", usable, texts)
    candidates = known_special or known
    if not candidates:
        raise DataError(
            f"{path}: has none of the known end-of-document tokens ({', '.join(KNOWN_NAMES)}), and no file beside it "
            f"declares an eos_token: {OPTION}"
        )
    return _only(f"{path}: its vocabulary has", candidates, texts)


def _named(path: Path, vocabulary: Mapping[str, int], named: str | int) -> int:
    id = vocabulary.get(named) if isinstance(named, str) else named if named in vocabulary.values() else None
    if id is None:
        raise DataError(f"{path}: has no token {named!r} to end documents with")
    return id


def _declared(path: Path, vocabulary: Mapping[str, int], ends: Mapping[str, str]) -> int:
    if len(set(ends.values())) > 1:
        said = " and ".join(f"{token} in {name}" for name, token in ends.items())
        raise DataError(f"{path}: its eos_token is {said}: {OPTION}")
    name, token = next(iter(ends.items()))
    if token not in vocabulary:
        raise DataError(f"{path.with_name(name)}: eos_token {token!r} is not in {path.name}: {OPTION}")
    return vocabulary[token]


def _only(what: str, ids: list[int], texts: Mapping[int, str]) -> int:
    if len(ids) > 1:
        tokens = " and ".join(texts[id] for id in ids)
        raise DataError(f"{what} {tokens}, each of which may end a document: {OPTION}")
    return ids[0]


def _fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _FILE_LIMIT:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes, more than such a file can have")
        fields = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{path}: not a JSON object")
    return fields


def _content(token: Any) -> str | None:
    """Return the text of a token, which transformers writes as text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(id for id in values if isinstance(id, int) and not isinstance(id, bool))
