"""Tokenized parts on their way to one `.bin`/`.idx` pair: each a file of its own, complete or absent.

A part's file name is made from everything that its tokens depend on, so that whatever an earlier, killed run left
behind is used where it fits and ignored where it does not.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from trainer.data.indexed import Sidecar, content_hash, megatron_indexed
from trainer.data.text import TextPart, documents
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError

_FORMAT = 1
"""Of the parts; another one makes the parts of an older version be ignored."""

LONGEST = 2**31 - 1
"""Tokens of one document: the `.idx` file counts them in int32."""


def dtype_for(vocabulary_size: int) -> type[np.uint16] | type[np.int32]:
    """Megatron's choice of type for a vocabulary."""
    return np.uint16 if vocabulary_size < 65_500 else np.int32


def part_path(folder: Path, part: TextPart, tokenizer: Tokenizer, text_key: str) -> Path:
    """Where the tokens of a part belong."""
    digest = xxhash.xxh3_128(part.payload)
    kept = [] if part.keep is None else [part.keep]
    digest.update(msgspec.json.encode([_FORMAT, tokenizer.hash, text_key, part.json_lines, *kept]))
    return folder / f"{digest.hexdigest()}.npz"


def write_part(path: Path, part: TextPart, tokenizer: Tokenizer, text_key: str) -> None:
    """Tokenize a part and write it whole or not at all.

    Raises:
        DataError: the text is not what it should be; names file and line.
        OSError: the folder cannot be written.
    """
    encoded = tokenizer.encode_batch(documents(part, text_key))
    lengths = np.array([len(ids) + 1 for ids in encoded], np.int64)
    if lengths.max(initial=0) > LONGEST:
        raise DataError(f"{part.path}: a document of more than {LONGEST:,} tokens does not fit the file format")
    tokens: npt.NDArray[np.int64] = np.full(int(lengths.sum()), tokenizer.end_of_document, np.int64)
    begin = 0
    for ids in encoded:
        tokens[begin : begin + len(ids)] = ids
        begin += len(ids) + 1
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as stream:
        np.savez(stream, tokens=tokens.astype(dtype_for(tokenizer.vocabulary_size)), lengths=lengths)
    unfinished.replace(path)


def merge(folder: Path, paths: Sequence[Path], prefix: Path, tokenizer: Tokenizer) -> Sidecar:
    """Put the parts together as `prefix`, through Megatron's builder. `.idx` appears last: with it, all is there.

    Raises:
        DataError: there is no document in them.
    """
    new_bin, new_idx, new_json = (folder / f"merged.{suffix}" for suffix in ("bin", "idx", "json"))
    builder = megatron_indexed().IndexedDatasetBuilder(str(new_bin), dtype=dtype_for(tokenizer.vocabulary_size))
    count, tokens, max_id = 0, 0, 0
    for path in paths:
        with np.load(path, allow_pickle=False) as part:
            stream, lengths = part["tokens"], part["lengths"]
        for document in np.split(stream, np.cumsum(lengths)[:-1]) if len(lengths) else []:
            builder.add_document(document, [len(document)])
        count, tokens = count + len(lengths), tokens + len(stream)
        max_id = max(max_id, int(stream.max(initial=0)))
    builder.finalize(str(new_idx))
    if not count:
        for path in {*paths}:
            path.unlink()
        raise DataError(f"{prefix}: nothing to write: the input holds no text")
    sidecar = Sidecar(
        content=content_hash(new_bin, new_idx),
        tokenizer=tokenizer.name,
        tokenizer_hash=tokenizer.hash,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_document=tokenizer.end_of_document,
        documents=count,
        tokens=tokens,
        max_id=max_id,
    )
    new_json.write_bytes(msgspec.json.format(msgspec.json.encode(sidecar)) + b"\n")
    for new, suffix in ((new_bin, ".bin"), (new_json, ".json"), (new_idx, ".idx")):
        _sync(new)
        new.replace(f"{prefix}{suffix}")
    _sync(prefix.parent)
    return sidecar


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
