"""Tokenizers: bytes, Hugging Face `tokenizer.json`, SentencePiece `.model`. Torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from keepwarm.trainer.errors import DataError

if TYPE_CHECKING:
    pass

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "<|end_of_document|>", "</s>", "<eos>")
"""Names of end-of-document tokens in `tokenizer.json` files; the first one present is used."""


class Tokenizer(Protocol):
    """Converts text to token ids and back."""

    @property
    def name(self) -> str:
        """The argument of `load_tokenizer`."""
        ...

    @property
    def hash(self) -> str:
        """Equal for equal tokenizers, wherever their files lie."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Largest id plus one."""
        ...

    @property
    def end_of_document(self) -> int:
        """Id that is appended to every document."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; special tokens are neither added nor recognised in the text."""
        ...

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of text that is ours rather than data, such as a control token: special tokens are
        recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer: `bytes`, or a tokenizer file, by its suffix.

    Raises:
        DataError: the file is missing, not a tokenizer, or has no end-of-document token; names it.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.suffix not in (".json", ".model"):
        raise DataError(f"{name}: not a tokenizer: give `bytes`, a tokenizer.json or a SentencePiece .model")
    if not path.is_file():
        raise DataError(f"{name}: no such tokenizer file")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 at the end of a document."""

    name = "bytes"
    hash = "bytes"
    vocabulary_size = 257
    end_of_document = 256

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def encode_marked(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        pieces = bytes(id for id in ids if id < 256)
        return pieces.decode("utf-8", "replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json`, through the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            loaded: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise DataError(f"{path}: not a tokenizer.json: {error}") from None
        loaded.no_truncation()
        loaded.no_padding()
        loaded.encode_special_tokens = True
        ids = [loaded.token_to_id(token) for token in END_OF_DOCUMENT]
        ends = [id for id in ids if id is not None]
        if not ends:
            raise DataError(f"{path}: has none of the known end-of-document tokens: {', '.join(END_OF_DOCUMENT)}")
        self._tokenizer = loaded
        self.name, self.hash = str(path), _file_hash(path)
        self.end_of_document: int = ends[0]
        self.vocabulary_size = max(loaded.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_marked(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


class SentencePieceTokenizer:
    """A SentencePiece `.model`; its end-of-sentence token ends a document."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except Exception:
            raise DataError(f"{path}: not a SentencePiece model") from None
        if self._processor.eos_id() < 0:
            raise DataError(f"{path}: has no end-of-sentence token to end documents with")
        self.name, self.hash = str(path), _file_hash(path)
        self.end_of_document: int = self._processor.eos_id()
        self.vocabulary_size: int = self._processor.get_piece_size()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return encoded

    def encode_marked(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([id for id in ids if id != self.end_of_document])
        return text


def _file_hash(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())
