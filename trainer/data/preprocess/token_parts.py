"""Tokenized parts that are merged into one `.bin`/`.idx` pair: each a file of its own, complete or absent.

A part's file name depends on everything that determines its tokens, so that files left by an earlier, killed run are
reused if they fit and ignored otherwise.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from keepwarm.files import READABLE, atomic_file, sync_directory, sync_file
from keepwarm.trainer.data.indexed import Sidecar, content_hash
from keepwarm.trainer.data.preprocess.prefix import Control
from keepwarm.trainer.data.preprocess.text import TextPart, prefixed_documents
from keepwarm.trainer.data.token_format import LONGEST, TokenFileWriter, dtype_for
from keepwarm.trainer.data.tokenizer import Tokenizer
from keepwarm.trainer.errors import DataError

_FORMAT = 2
"""Version of the parts; parts of other versions are ignored."""


def part_path(folder: Path, part: TextPart, tokenizer: Tokenizer, text_key: str) -> Path:
    """Return the path for the tokens of a part."""
    digest = xxhash.xxh3_128(part.payload)
    chosen = [one for one in (part.keep, part.prefix) if one is not None]
    digest.update(msgspec.json.encode([_FORMAT, tokenizer.hash, text_key, part.json_lines, *chosen]))
    return folder / f"{digest.hexdigest()}.npz"


def write_part(path: Path, part: TextPart, tokenizer: Tokenizer, text_key: str) -> None:
    """Tokenize a part and write it atomically.

    Raises:
        DataError: the text is not as expected; names file and line.
        OSError: the folder cannot be written.
    """
    pairs = prefixed_documents(part, text_key)
    before = _encoded_prefixes(part, tokenizer, sorted({prefix for prefix, _ in pairs}))
    texts = tokenizer.encode_batch([text for _, text in pairs])
    encoded = [(before[prefix], ids) for (prefix, _), ids in zip(pairs, texts, strict=True)]
    prefixes = np.array([len(prefix) for prefix, _ in encoded], np.int64)
    lengths = np.array([len(prefix) + len(ids) + 1 for prefix, ids in encoded], np.int64)
    if lengths.max(initial=0) > LONGEST:
        raise DataError(f"{part.path}: a document of more than {LONGEST:,} tokens does not fit the file format")
    tokens: npt.NDArray[np.int64] = np.full(int(lengths.sum()), tokenizer.end_of_document, np.int64)
    begin = 0
    for (prefix, ids), length in zip(encoded, lengths.tolist(), strict=True):
        tokens[begin : begin + length - 1] = [*prefix, *ids]
        begin += length
    with atomic_file(path, mode=READABLE) as stream:
        np.savez(stream, tokens=tokens.astype(dtype_for(tokenizer.vocabulary_size)), lengths=lengths, prefixes=prefixes)


def _encoded_prefixes(part: TextPart, tokenizer: Tokenizer, prefixes: Sequence[str]) -> dict[str, list[int]]:
    """Return ids by prefix. Special tokens are recognised in control tokens, which users choose, but not in
    metadata."""
    if isinstance(part.prefix, Control):
        return {prefix: tokenizer.encode_marked(prefix) for prefix in prefixes}
    return dict(zip(prefixes, tokenizer.encode_batch(prefixes), strict=True))


def merge(folder: Path, paths: Sequence[Path], prefix: Path, tokenizer: Tokenizer) -> Sidecar:
    """Merge the parts into `prefix`, in Megatron's format. `.idx` is written last: once it exists, all is complete.

    Raises:
        DataError: the parts contain no document.
    """
    new_bin, new_idx, new_json = (folder / f"merged.{suffix}" for suffix in ("bin", "idx", "json"))
    count, tokens, max_id, prefixed = 0, 0, 0, 0
    with TokenFileWriter(new_bin, dtype_for(tokenizer.vocabulary_size)) as writer:
        for path in paths:
            with np.load(path, allow_pickle=False) as part:
                stream, lengths, prefixes = part["tokens"], part["lengths"], part["prefixes"]
            split = np.split(stream, np.cumsum(lengths)[:-1]) if len(lengths) else []
            for document, before in zip(split, prefixes.tolist(), strict=True):
                writer.add_document(document, [before, len(document) - before] if before else [len(document)])
            count, tokens = count + len(lengths), tokens + len(stream)
            prefixed += int(np.count_nonzero(prefixes))
            max_id = max(max_id, int(stream.max(initial=0)))
        writer.finish(new_idx)
    if not count:
        for path in {*paths}:
            path.unlink()
        raise DataError(f"{prefix}: nothing to write: the input contains no text")
    sidecar = Sidecar(
        content=content_hash(new_bin, new_idx),
        tokenizer=tokenizer.name,
        tokenizer_hash=tokenizer.hash,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_document=tokenizer.end_of_document,
        documents=count,
        tokens=tokens,
        max_id=max_id,
        prefixed=prefixed,
    )
    new_json.write_bytes(msgspec.json.format(msgspec.json.encode(sidecar)) + b"\n")
    for new, suffix in ((new_bin, ".bin"), (new_json, ".json"), (new_idx, ".idx")):
        sync_file(new)
        new.replace(f"{prefix}{suffix}")
    sync_directory(prefix.parent)
    return sidecar
