"""Other vocabularies: rows of shared tokens are kept, new ones begin as means of old ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from keepwarm.trainer.errors import DataError, SpecError
from keepwarm.trainer.surgery.weights import Array, Derivation, Model, write

Start = Literal["mean", "neighbours"]

NEIGHBOURS = 10
_ROWS = ("embedding.weight", "head.weight")
_GRAM = 3

Mix = tuple[npt.NDArray[np.int64], Array]
"""Old rows, and how much of each: the weights add up to 1."""


def change_vocabulary(
    model: Model, old: Mapping[str, int], new: Mapping[str, int], size: int | None, start: Start, destination: Path
) -> dict[str, Any]:
    """The model for the tokens `new`, whose text and id are known, as those of `old` are.

    Tokens of equal text keep their rows in embedding and head, so that their logits stay. A new one gets the mean of
    all old rows, or with `neighbours` a mean of the rows of the old tokens most like it in their text. Ids without a
    token, up to `size`, get the mean.

    Raises:
        SpecError: `size` is too small for the ids.
    """
    needed = max(new.values(), default=-1) + 1
    rows = size if size is not None else max(needed, 1)
    if rows < needed:
        raise SpecError(f"--size {rows}: the new tokenizer has ids up to {needed - 1}")
    known = {text: at for text, at in old.items() if at < model.spec.vocabulary_size}
    shared = {at: known[text] for text, at in new.items() if text in known}
    fresh = {at: text for text, at in new.items() if text not in known}
    mixes = _nearest(fresh, known) if start == "neighbours" else {}

    def make(name: str) -> Array:
        values = model.read(name)
        if name not in _ROWS:
            return values
        mean = values[sorted(known.values())].mean(axis=0, dtype=np.float64).astype(np.float32)
        made = np.tile(mean, (rows, 1))
        if shared:
            made[list(shared)] = values[list(shared.values())]
        for at, (sources, weights) in mixes.items():
            made[at] = weights @ values[sources]
        return made

    done = write(
        destination,
        model.spec.model_copy(update={"vocabulary_size": rows}),
        make,
        Derivation(
            parents=[model],
            made_by="given another vocabulary",
            settings={"size": rows, "start": start, "shared": len(shared), "new": len(fresh)},
            keep_files=False,
        ),
        dtype=model.dtype,
    )
    return done | {"shared": len(shared), "new": len(fresh)}


def read_vocabulary(path: Path) -> dict[str, int]:
    """Texts and ids of a tokenizer.json. Raises `DataError` naming the file."""
    import tokenizers

    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise DataError(f"{path}: not a tokenizer.json: {error}") from None
    found: dict[str, int] = loaded.get_vocab(with_added_tokens=True)
    return found


def _nearest(fresh: Mapping[int, str], known: Mapping[str, int]) -> dict[int, Mix]:
    """By the cosine of counts of character trigrams, of the `NEIGHBOURS` most alike; nothing for a token unlike all."""
    holders: dict[str, list[int]] = {}
    texts = list(known)
    lengths = np.empty(len(texts))
    for index, text in enumerate(texts):
        grams = _grams(text)
        lengths[index] = np.sqrt(len(grams))
        for gram in set(grams):
            holders.setdefault(gram, []).append(index)
    ids = np.fromiter((known[text] for text in texts), np.int64, len(texts))
    found: dict[int, Mix] = {}
    for at, text in fresh.items():
        grams = _grams(text)
        alike: dict[int, float] = {}
        for gram in set(grams):
            for index in holders.get(gram, ()):
                alike[index] = alike.get(index, 0.0) + 1.0 / float(lengths[index])
        best = sorted(alike, key=lambda index: (-alike[index], index))[:NEIGHBOURS]
        if best:
            weights = np.array([alike[index] for index in best])
            found[at] = ids[best], (weights / weights.sum()).astype(np.float32)
    return found


def _grams(text: str) -> Sequence[str]:
    edged = f"\0{text}\0"
    return [edged[at : at + _GRAM] for at in range(max(1, len(edged) - _GRAM + 1))]
