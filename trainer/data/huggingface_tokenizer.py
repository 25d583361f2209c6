"""A `tokenizer.json`, through the `tokenizers` library. Torch-free."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from keepwarm.foreign_json import BOM, parse_json
from keepwarm.trainer.data.control_tokens import special_ids, unknown_id, without_tokens
from keepwarm.trainer.data.end_of_document import choose_end_of_document, declared_beside
from keepwarm.trainer.errors import DataError

if TYPE_CHECKING:
    import tokenizers


class HuggingFaceTokenizer:
    """A tokenizer whose control tokens no text can give.

    Control tokens are the end of a document, special added tokens, what the post-processor adds, and the boundaries
    that the files beside it declare, except the token for unknown text. Texts are encoded by the library as it is. Only
    those in which a control token then occurs are encoded once more, by a second tokenizer whose vocabulary lacks all
    of them. All other texts keep the ids that the library gives; the cost is one look at every id.
    """

    def __init__(self, path: Path, end_of_document: str | int | None = None) -> None:
        raw = path.read_bytes()
        self.name, self.hash = str(path), xxhash.xxh3_128_hexdigest(raw)
        raw = raw.removeprefix(BOM)
        description = self._description(raw)
        with _refusals(f"{path}: not a tokenizer.json"):
            self._tokenizer = _loaded(raw)
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            special, unknown = special_ids(description), unknown_id(description)
        if not vocabulary:
            raise DataError(f"{path}: its vocabulary is empty")
        declared = declared_beside(path)
        self._raw, self._unknown = raw, unknown
        self.end_of_document = choose_end_of_document(path, vocabulary, special, declared, end_of_document)
        boundaries = {vocabulary[token] for token in declared.boundaries if token in vocabulary}
        self._control = (special | boundaries) - {unknown} | {self.end_of_document}
        self.vocabulary_size = max(vocabulary.values()) + 1
        own = self._tokenizer.get_vocab(with_added_tokens=False).values()
        self.largest_id = max({*own} - self._control | {self.end_of_document})

    @property
    def end_of_document_text(self) -> str:
        """The text of the token that ends a document."""
        return str(self._tokenizer.id_to_token(self.end_of_document))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _refusals(f"{self.name}: cannot encode a text"):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        encoded: list[list[int]] = [encoding.ids for encoding in encodings]
        for index, ids in enumerate(encoded):
            if not self._control.isdisjoint(ids):
                encoded[index] = self._encoded_without_control(texts[index])
        return encoded

    def encode_marked(self, text: str) -> list[int]:
        ids: list[int] = self._marking.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        shown = [id for id in ids if id != self.end_of_document]
        return self._tokenizer.decode(shown, skip_special_tokens=True)

    def _description(self, raw: bytes) -> dict[str, Any]:
        try:
            description = parse_json(raw, unique_keys=False)
        except ValueError as error:
            raise DataError(f"{self.name}: not a tokenizer.json: {error}") from None
        model = description.get("model") if isinstance(description, dict) else None
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), list | dict):
            raise DataError(f"{self.name}: not a tokenizer.json: it has no model with a vocabulary")
        found: dict[str, Any] = description
        return found

    def _encoded_without_control(self, text: str) -> list[int]:
        tokenizer, own_id = self._without_control
        unknown = "" if self._unknown not in self._control else ", and its token for unknown text ends documents"
        with _refusals(f"{self.name}: cannot encode a text without its control tokens{unknown}"):
            return [own_id[id] for id in tokenizer.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _without_control(self) -> "tuple[tokenizers.Tokenizer, dict[int, int]]":
        """The tokenizer that lacks all control tokens, and our ids by its ids."""
        reduced = without_tokens(self._description(self._raw), self._control)
        with _refusals(f"{self.name}: cannot be used without its control tokens"):
            tokenizer = _loaded(msgspec.json.encode(reduced))
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        return tokenizer, {id: ids[token] for token, id in tokenizer.get_vocab(with_added_tokens=True).items()}

    @cached_property
    def _marking(self) -> "tokenizers.Tokenizer":
        """A tokenizer of its own, since others may be encoding data at the same time."""
        tokenizer = _loaded(self._raw)
        tokenizer.encode_special_tokens = False
        return tokenizer


def _loaded(raw: bytes) -> "tokenizers.Tokenizer":
    import tokenizers

    tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Raise DataError for every error of the library, whose panics are no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {' '.join(str(error).split())[:300]}") from None
