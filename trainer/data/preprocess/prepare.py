"""Open the sources that a job names, tokenizing text first."""

import fcntl
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.data.preprocess.progress import LogObserver, input_bytes
from keepwarm.trainer.data.preprocess.text import is_text
from keepwarm.trainer.data.preprocess.tokenize import tokenize
from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
from keepwarm.trainer.data.spec import DataSpec
from keepwarm.trainer.data.tokenizer import Tokenizer, load_tokenizer
from keepwarm.trainer.errors import DataError, OutputError, TrainerError


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The sources that a job's data section describes."""

    sources: Mapping[str, PackedSource]
    validation: Mapping[str, PackedSource]
    tokenizer: str | None
    """Hash of the single tokenizer used for all of them; None if no sidecar records it."""


def prepare_sources(data: DataSpec, vocabulary_size: int, cache: Path, *, timeout: float = 3600.0) -> PreparedData:
    """Open every source, tokenizing text into `cache` first.

    Any number of processes may call this at once: the first one tokenizes, the others wait for its lock. Files in
    `cache` are named after the content of text and tokenizer, so that a second run finds them.

    Args:
        data: its paths are used unchanged.
        vocabulary_size: the model's; every token id, and the tokenizer's vocabulary, must fit into it.
        timeout: seconds to wait for another process.

    Raises:
        DataError: a file or the tokenizer cannot be used; names the key and the file.
    """
    paths = {f"data.sources.{name}": path for name, path in data.sources.items()}
    paths |= {f"data.validation.{name}": path for name, path in data.validation.items()}
    tokenizer = None
    if data.tokenizer != "bytes" or any(is_text(path) for path in paths.values()):
        tokenizer = _fitting_tokenizer(data, vocabulary_size)
    opened: dict[str, PackedSource] = {}
    for key, path in paths.items():
        try:
            prefix = _as_tokens(path, tokenizer, cache, timeout) if is_text(path) else Path(path)
            tokens = TokenFile(prefix, vocabulary_size)
            name = key.split(".", 2)[2]
            opened[key] = PackedSource(name, tokens, data.sequence_length, data.document_mask)
        except TrainerError as error:
            said = str(error)
            if is_text(path) and isinstance(error, DataError):
                # The user knows the text, not the file of its tokens.
                said = path.join(re.split(rf"{re.escape(str(cache))}/[^\s:]+", said))
            raise type(error)(f"{key}: {said}") from None
    hashed = _check_one_tokenizer(opened, tokenizer)
    return PreparedData(
        tokenizer=hashed,
        sources={source.name: source for key, source in opened.items() if key.startswith("data.sources.")},
        validation={source.name: source for key, source in opened.items() if key.startswith("data.validation.")},
    )


def _fitting_tokenizer(data: DataSpec, vocabulary_size: int) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(data.tokenizer, data.end_of_document)
    except DataError as error:
        raise DataError(f"data.tokenizer: {error}") from None
    # Added tokens beyond the model's vocabulary do no harm unless a text has them; each source is checked for that.
    if tokenizer.largest_id >= vocabulary_size:
        raise DataError(
            f"data.tokenizer: {data.tokenizer} has a vocabulary of {tokenizer.largest_id + 1}, which does not fit into "
            f"model.vocabulary_size = {vocabulary_size}"
        )
    return tokenizer


def _as_tokens(path: str, tokenizer: Tokenizer | None, cache: Path, timeout: float) -> Path:
    """Return the prefix of the token file for a text file, tokenizing it if necessary."""
    text = Path(path)
    if not text.is_file():
        raise DataError(f"{path}: no such file")
    assert tokenizer is not None
    digest = xxhash.xxh3_128(f"{tokenizer.hash} {tokenizer.end_of_document}".encode())
    with text.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    prefix = cache / f"{text.name.split('.')[0]}-{digest.hexdigest()}"
    if not Path(f"{prefix}.idx").exists():
        with _lock(Path(f"{prefix}.lock"), timeout):
            if not Path(f"{prefix}.idx").exists():
                options = TextOptions(end_of_document=tokenizer.end_of_document)
                seen = LogObserver(f"tokenizing {path}", input_bytes([text]))
                tokenize([text], prefix, tokenizer.name, options, observer=seen)
    return prefix


@contextmanager
def _lock(path: Path, timeout: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror}") from None
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(f"{path}: waited {timeout:g} s for the process that is tokenizing") from None
                time.sleep(0.05)
            else:
                break
        yield


def _check_one_tokenizer(opened: Mapping[str, PackedSource], tokenizer: Tokenizer | None) -> str | None:
    """Check that all sources use the same tokenizer, since ids of different tokenizers mean different text."""
    hashes = {} if tokenizer is None else {"data.tokenizer": tokenizer.hash}
    ends = {} if tokenizer is None else {"data.tokenizer": tokenizer.end_of_document}
    for key, source in opened.items():
        sidecar = source.tokens.sidecar if isinstance(source.tokens, TokenFile) else None
        if sidecar is not None:
            hashes[key], ends[key] = sidecar.tokenizer_hash, sidecar.end_of_document
    for key, hash_ in hashes.items():
        first = next(iter(hashes))
        if hash_ != hashes[first]:
            raise DataError(f"{key}: made with another tokenizer than {first}")
        if ends[key] != ends[first]:
            raise DataError(
                f"{key}: its documents end with token {ends[key]}, those of {first} with {ends[first]}: choose "
                "one with data.end_of_document, or tokenize again"
            )
    return next(iter(hashes.values()), None)
