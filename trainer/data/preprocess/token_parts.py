"""Tokenized parts that are merged into one `.bin`/`.idx` pair: each a file of its own, complete or absent.

A part's file name depends on everything that determines its tokens, so that files left by an earlier, killed run are
reused if they fit and ignored otherwise.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from keepwarm.files import READABLE, atomic_file, sync_directory, sync_file
from keepwarm.text import counted
from keepwarm.trainer.data.indexed import Sidecar, content_hash
from keepwarm.trainer.data.preprocess.prefix import Control
from keepwarm.trainer.data.preprocess.progress import Observer
from keepwarm.trainer.data.preprocess.text import BadLine, TextPart, prefixed_documents, sentences
from keepwarm.trainer.data.token_format import LONGEST, TokenFileWriter, dtype_for
from keepwarm.trainer.data.tokenizer import Tokenizer
from keepwarm.trainer.errors import DataError, OutputError

_FORMAT = 3
"""Version of the parts; parts of other versions are ignored."""
_EXAMPLES = 3
"""Number of bad lines of a part that are named."""


def part_path(folder: Path, part: TextPart, tokenizer: Tokenizer, text_key: str) -> Path:
    """Return the path for the tokens of a part."""
    digest = xxhash.xxh3_128(part.payload)
    chosen = (part.selection.keep, part.selection.prefix, part.selection.skip_bad_lines)
    encoding = (tokenizer.hash, tokenizer.end_of_document)
    digest.update(msgspec.json.encode([_FORMAT, *encoding, text_key, part.json_lines, *chosen]))
    return folder / f"{digest.hexdigest()}.npz"


def write_part(path: Path, part: TextPart, tokenizer: Tokenizer, text_key: str) -> None:
    """Tokenize a part and write it atomically.

    Raises:
        DataError: the text is not as expected; names file and line.
        OSError: the folder cannot be written.
    """
    pairs, bad = prefixed_documents(part, text_key)
    try:
        before = _encoded_prefixes(part, tokenizer, sorted({prefix for prefix, _ in pairs}))
        texts = tokenizer.encode_batch([text for _, text in pairs])
    except DataError as error:
        raise DataError(f"{part.path}, from line {part.first_line}: {error}") from None
    prefixes = np.array([len(before[prefix]) for prefix, _ in pairs], np.int64)
    lengths = prefixes + np.array([len(ids) + 1 for ids in texts], np.int64)
    if lengths.max(initial=0) > LONGEST:
        raise DataError(f"{part.path}: a document of more than {LONGEST:,} tokens does not fit the file format")
    end = (tokenizer.end_of_document,)
    pieces = (ids for (prefix, _), text in zip(pairs, texts, strict=True) for ids in (before[prefix], text, end))
    dtype = dtype_for(tokenizer.vocabulary_size)
    tokens: npt.NDArray[Any] = np.fromiter(chain.from_iterable(pieces), dtype, int(lengths.sum()))
    with atomic_file(path, mode=READABLE) as stream:
        np.savez(
            stream,
            tokens=tokens,
            lengths=lengths,
            prefixes=prefixes,
            bad=np.int64(len(bad)),
            bad_offsets=np.array([one.offset for one in bad[:_EXAMPLES]], np.int64),
            bad_reasons=np.array([one.reason for one in bad[:_EXAMPLES]], np.str_),
        )


def bad_lines(path: Path, part: TextPart) -> tuple[int, list[str]]:
    """Return how many lines of a written part were left out as bad, and a sentence about each of the first few.

    Raises:
        OutputError: the part is damaged.
    """
    with _opened(path) as stored:
        first = map(BadLine, stored["bad_offsets"].tolist(), stored["bad_reasons"].tolist())
        return int(stored["bad"]), sentences(part, [*first])


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
    """Open a part; one that a loss of power damaged is removed, since the next run can make it again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            yield stored
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        raise OutputError(f"{path}: a damaged part, now removed: run the same command again ({error})") from None


def _encoded_prefixes(part: TextPart, tokenizer: Tokenizer, prefixes: Sequence[str]) -> dict[str, list[int]]:
    """Return ids by prefix. Special tokens are recognised in control tokens, which users choose, but not in
    metadata."""
    if isinstance(part.selection.prefix, Control):
        marked = {prefix: tokenizer.encode_marked(prefix) for prefix in prefixes}
        if ending := [prefix for prefix, ids in marked.items() if tokenizer.end_of_document in ids]:
            raise DataError(
                f"--control {ending[0]}: gives the end-of-document token of {tokenizer.name}: choose another"
            )
        return marked
    return dict(zip(prefixes, tokenizer.encode_batch(prefixes), strict=True))


def merge(folder: Path, paths: Sequence[Path], prefix: Path, tokenizer: Tokenizer, observer: Observer) -> Sidecar:
    """Merge the parts into `prefix`, in Megatron's format. `.idx` is written last: once it exists, all is complete.

    Raises:
        DataError: the parts contain no document.
    """
    new_bin, new_idx, new_json = (folder / f"merged.{suffix}" for suffix in ("bin", "idx", "json"))
    count, tokens, max_id, prefixed, skipped = 0, 0, 0, 0, 0
    with TokenFileWriter(new_bin, dtype_for(tokenizer.vocabulary_size)) as writer:
        for number, path in enumerate(paths, 1):
            with _opened(path) as part:
                stream, lengths, prefixes = part["tokens"], part["lengths"], part["prefixes"]
                skipped += int(part["bad"])
            split = np.split(stream, np.cumsum(lengths)[:-1]) if len(lengths) else []
            for document, before in zip(split, prefixes.tolist(), strict=True):
                writer.add_document(document, [before, len(document) - before] if before else [len(document)])
            count, tokens = count + len(lengths), tokens + len(stream)
            prefixed += int(np.count_nonzero(prefixes))
            max_id = max(max_id, int(stream.max(initial=0)))
            observer.merged(number, len(paths))
        writer.finish(new_idx)
    if not count:
        for path in {*paths}:
            path.unlink()
        bad = f"; left out: {counted(skipped, 'bad line')}" if skipped else ""
        raise DataError(f"{prefix}: nothing to write: the input contains no text{bad}")
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
        skipped=skipped,
    )
    new_json.write_bytes(msgspec.json.format(msgspec.json.encode(sidecar)) + b"\n")
    for new, suffix in ((new_bin, ".bin"), (new_json, ".json"), (new_idx, ".idx")):
        sync_file(new)
        new.replace(f"{prefix}{suffix}")
    sync_directory(prefix.parent)
    return sidecar
