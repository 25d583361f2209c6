"""A `tokenizer.json` without some of its tokens, so that no text can give them. Torch-free.

`tokenizers` can leave added tokens unrecognised in text, but the model behind them still has their names as ordinary
entries: Unigram, WordLevel and WordPiece find `</s>` in a text, also where a normaliser made it of other characters.
"""

from typing import Any


def without_tokens(tokenizer: dict[str, Any], ids: frozenset[int]) -> dict[str, Any]:
    """Return the description of a tokenizer that lacks the tokens `ids`, in which all other texts remain.

    Ids may differ from those of the original: map them by text. If the token for unknown text is among `ids`, text that
    the vocabulary cannot express is an error of the library.
    """
    model = dict(tokenizer["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        kept = [index for index in range(len(vocabulary)) if index not in ids]
        model["vocab"] = [vocabulary[index] for index in kept]
        unknown = model.get("unk_id")
        model["unk_id"] = kept.index(unknown) if unknown in kept else None
    else:
        removed = {token for token, id in vocabulary.items() if id in ids}
        model["vocab"] = {token: id for token, id in vocabulary.items() if id not in ids}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [merge for merge in model["merges"] if not removed & set(_involved(merge, prefix))]
    return {
        **tokenizer,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": [token for token in tokenizer.get("added_tokens") or [] if token["id"] not in ids],
        "model": model,
    }


def _involved(merge: str | list[str], prefix: str) -> tuple[str, str, str]:
    """Return both sides of a merge and its result."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)


def special_ids(tokenizer: dict[str, Any]) -> frozenset[int]:
    """Return the ids of special added tokens, and of those that the post-processor puts around a text."""
    added = {token["id"] for token in tokenizer.get("added_tokens") or [] if token.get("special")}
    around: set[int] = set()
    for step in _steps(tokenizer.get("post_processor")):
        if step.get("type") == "TemplateProcessing":
            around |= {id for token in (step.get("special_tokens") or {}).values() for id in token["ids"]}
        around |= {step[side][1] for side in ("sep", "cls") if step.get(side)}
    return frozenset(added | around)


def unknown_id(tokenizer: dict[str, Any]) -> int | None:
    """Return the id that the model gives to text that it cannot express; None if it has none."""
    model = tokenizer["model"]
    if isinstance(model["vocab"], list):
        unknown: int | None = model.get("unk_id")
        return unknown
    token = model.get("unk_token")
    found: int | None = None if token is None else model["vocab"].get(token)
    return found


def _steps(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not processor:
        return []
    return [one for step in processor.get("processors") or [] for one in _steps(step)] or [processor]
