"""Small `tokenizer.json` files of every model that the `tokenizers` library has, each with an end of a document."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz</>[]|_ ."


def unigram(folder: Path, special: Sequence[str] = ("</s>",)) -> Path:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((one, -3.0) for one in LETTERS if one != " ")]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    return saved(model, folder, special)


def word_level(folder: Path, special: Sequence[str] = ("</s>",), *, unknown: str = "[UNK]") -> Path:
    words = ("[UNK]", "</s>", "a", "b", "text", "words")
    model = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token=unknown))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return saved(model, folder, special)


def word_piece(folder: Path, special: Sequence[str] = ("</s>",)) -> Path:
    pieces = ["[UNK]", "</s>", *LETTERS, *(f"##{one}" for one in LETTERS)]
    model = tokenizers.Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.WordPiece()
    return saved(model, folder, special)


def byte_level(
    folder: Path, special: Sequence[str] = ("<|endoftext|>",), merges: Sequence[tuple[str, str]] = ()
) -> Path:
    """Bytes as in GPT-2, and merges; any text comes back from its ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*special, *alphabet, *(left + right for left, right in merges)]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, list(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return saved(model, folder, special)


def saved(model: tokenizers.Tokenizer, folder: Path, special: Sequence[str]) -> Path:
    """Write the tokenizer with these special tokens and return its path."""
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    model.save(str(path))
    return path


KINDS = {"unigram": unigram, "word level": word_level, "word piece": word_piece, "byte level": byte_level}
