"""Tokenizers: bytes, Hugging Face `tokenizer.json`, SentencePiece `.model`. Torch-free."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash

from keepwarm.trainer.data.huggingface_tokenizer import HuggingFaceTokenizer
from keepwarm.trainer.errors import DataError


class Tokenizer(Protocol):
    """Converts text to token ids and back."""

    @property
    def name(self) -> str:
        """The argument of `load_tokenizer`."""
        ...

    @property
    def hash(self) -> str:
        """Equal for equal tokenizers, wherever their files lie; the choice of the end of a document is not part."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Largest id plus one."""
        ...

    @property
    def largest_id(self) -> int:
        """Largest id that the model behind the tokenizer gives to a document, its end included. Added tokens that a
        text may or may not contain do not count."""
        ...

    @property
    def end_of_document(self) -> int:
        """Id that is appended to every document."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; control tokens are neither added nor recognised in the text.

        Raises:
            DataError: a text cannot be encoded.
        """
        ...

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of text that is ours rather than data, such as a control token: special tokens are
        recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(name: str, end_of_document: str | int | None = None) -> Tokenizer:
    """Load a tokenizer: `bytes`, or a tokenizer file, by its suffix.

    Args:
        end_of_document: text or id of the token that ends a document; None: the tokenizer's own.

    Raises:
        DataError: the file is missing, not a tokenizer, or has not exactly one end-of-document token; names it.
    """
    if name == "bytes":
        if end_of_document not in (None, ByteTokenizer.end_of_document):
            raise DataError(f"bytes have no token {end_of_document!r}: id 256 ends their documents")
        return ByteTokenizer()
    path = Path(name)
    if path.suffix.lower() not in (".json", ".model"):
        raise DataError(f"{name}: not a tokenizer: give `bytes`, a tokenizer.json or a SentencePiece .model")
    if not path.is_file():
        raise DataError(f"{name}: no such tokenizer file")
    kind = HuggingFaceTokenizer if path.suffix.lower() == ".json" else SentencePieceTokenizer
    try:
        return kind(path, end_of_document)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from None


def tokenizer_hash(path: Path) -> str:
    """Return the hash of the tokenizer in a file without loading it."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 at the end of a document."""

    name = "bytes"
    hash = "bytes"
    vocabulary_size = 257
    largest_id = end_of_document = 256

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def encode_marked(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        pieces = bytes(id for id in ids if id < 256)
        return pieces.decode("utf-8", "replace")


class SentencePieceTokenizer:
    """A SentencePiece `.model`; its end-of-sentence token ends a document."""

    def __init__(self, path: Path, end_of_document: str | int | None = None) -> None:
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except Exception:
            raise DataError(f"{path}: not a SentencePiece model") from None
        self.name, self.hash = str(path), tokenizer_hash(path)
        self.vocabulary_size: int = self._processor.get_piece_size()
        self.end_of_document: int = self._end(end_of_document)
        self.largest_id = self.vocabulary_size - 1

    def _end(self, named: str | int | None) -> int:
        if named is None and self._processor.eos_id() < 0:
            raise DataError(f"{self.name}: has no end-of-sentence token to end documents with")
        id: int = self._processor.piece_to_id(named) if isinstance(named, str) else self._processor.eos_id()
        if isinstance(named, int):
            id = named
        known = 0 <= id < self.vocabulary_size and not self._processor.is_unknown(id)
        if not known or (isinstance(named, str) and self._processor.id_to_piece(id) != named):
            raise DataError(f"{self.name}: has no token {named!r} to end documents with")
        return id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # SentencePiece reads user-defined and ordinary pieces in text, but never control symbols.
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=_threads())
        if any(self.end_of_document in ids for ids in encoded):
            piece = self._processor.id_to_piece(self.end_of_document)
            raise DataError(
                f"{self.name}: a text contains {piece}, which ends documents and is no control symbol of this model"
            )
        return encoded

    def encode_marked(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([id for id in ids if id != self.end_of_document])
        return text


def _threads() -> int:
    """Return the number of threads to encode with, which `tokenizers` takes from the same variable; -1: every core."""
    limit = os.environ.get("RAYON_NUM_THREADS", "")
    return int(limit) if limit.isdecimal() and int(limit) else -1
