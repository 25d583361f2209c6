"""The corpora below the paths that `keepwarm init` is given: what they are named, and how many tokens they have."""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from keepwarm.text import is_utf8, shown
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.preprocess.text import SUFFIXES, TextPart, documents, is_text, parts
from keepwarm.trainer.data.tokenizer import Tokenizer
from keepwarm.trainer.errors import DataError

MOST = 16
"""Files of one kind that a first job lists."""
_HELD_OUT = re.compile(r"(?:^|[._-])(?:valid(?:ation)?|val|dev|test|eval|heldout)(?=$|[._-])", re.IGNORECASE)
_PART_BYTES, _PARTS, _CHARACTERS = 1 << 18, 4, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One file of text, or one pair of token files."""

    name: str
    path: Path
    """Of the text, or the prefix of the token files; absolute."""
    is_text: bool


@dataclass(frozen=True, kw_only=True)
class Size:
    """The tokens of a corpus."""

    tokens: int
    exact: bool
    """False: estimated from its beginning."""


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """What the paths hold."""

    training: tuple[Corpus, ...]
    held_out: tuple[Corpus, ...]
    """Files whose name says so: `valid`, `test` and the like."""


def find_corpora(paths: Sequence[Path], option: str) -> Corpora:
    """Return the corpora at the paths: files, prefixes of token files, and what lies in a folder.

    Raises:
        DataError: a path is no corpus, or holds none, or too many; names the path and the option.
    """
    files = [file for path in paths for file in _files(path, option)]
    training = [file for file in files if not _HELD_OUT.search(_stem(file))]
    held_out = [file for file in files if file not in training]
    if files and not training:  # A corpus may have such a name by chance.
        training, held_out = held_out, []
    for some in (training, held_out):
        if len(some) > MOST:
            raise DataError(
                f"{option} {paths[0]}: {len(some)} files, and a job names each: make one source of them with "
                f"`keepwarm data tokenize --input FILE ... --output-prefix PREFIX --tokenizer TOKENIZER`"
            )
    return Corpora(training=_named(training), held_out=_named(held_out))


def unused_name(word: str, taken: Collection[str]) -> str:
    """Return the word, with the lowest number behind it that makes it a name that is not taken."""
    names = itertools.chain([word], (f"{word}_{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def size_of(corpus: Corpus, tokenizer: Tokenizer | None, vocabulary_size: int | None) -> Size:
    """Return the tokens of a corpus; of a large text, estimated from its first MiB.

    Raises:
        DataError: a file cannot be read as what its name says; names it.
    """
    if not corpus.is_text:
        return Size(tokens=TokenFile(corpus.path, vocabulary_size).count, exact=True)
    assert tokenizer is not None
    tokens, read, total = 0, 0, max(1, corpus.path.stat().st_size)
    for number, part in enumerate(parts(corpus.path, _PART_BYTES)):
        if number == _PARTS:
            return Size(tokens=int(tokens * total / max(1, read)), exact=False)
        counted, share = _tokens_of(part, tokenizer)
        tokens, read = tokens + int(counted / share), part.read_bytes
        if share < 1:
            return Size(tokens=tokens, exact=False)
    return Size(tokens=tokens, exact=True)


def _tokens_of(part: TextPart, tokenizer: Tokenizer) -> tuple[int, float]:
    """Return the tokens of the beginning of a part, and which share of its text that is."""
    texts = documents(part, "text")
    whole = sum(map(len, texts))
    if whole > _CHARACTERS:
        texts = [texts[0][:_CHARACTERS]]
    ids = tokenizer.encode_batch(texts)
    return sum(len(one) + 1 for one in ids), sum(map(len, texts)) / whole if whole else 1.0


def _files(path: Path, option: str) -> list[Path]:
    """Return the corpora at one path, token files by their prefix."""
    try:
        if path.is_dir():
            found = sorted({one for file in path.iterdir() if (one := _corpus_of(file)) is not None})
            if found:
                return found
            raise DataError(f"{option} {path}: no corpus in this folder: {_kinds()}")
        if path.is_file() and (one := _corpus_of(path)) is not None:
            return [one]
        if _is_prefix(path):
            return [_absolute(path)]
        exists = path.exists()
    except OSError as error:
        raise DataError(f"{option} {path}: {error.strerror or error}") from error
    raise DataError(f"{option} {path}: {'no corpus' if exists else 'no such file or folder'}: {_kinds()}")


def _corpus_of(file: Path) -> Path | None:
    """Return the corpus that a file belongs to: itself, or a prefix; None for a sidecar or anything else."""
    if file.name.startswith("."):
        return None
    if not is_utf8(file.name):
        raise DataError(f"{shown(str(file))}: the name is not UTF-8; rename it")
    if file.suffix in (".bin", ".idx"):
        prefix = file.with_suffix("")
        return _absolute(prefix) if _is_prefix(prefix) else None
    is_sidecar = file.suffix == ".json" and _is_prefix(file.with_suffix(""))
    return _absolute(file) if is_text(file) and file.is_file() and not is_sidecar else None


def _is_prefix(path: Path) -> bool:
    return all(Path(f"{path}{suffix}").is_file() for suffix in (".bin", ".idx"))


def _absolute(path: Path) -> Path:
    return path.absolute()


def _kinds() -> str:
    return f"give {', '.join(SUFFIXES)} (also .gz, .zst), or token files PREFIX.bin and PREFIX.idx by their prefix"


def _stem(path: Path) -> str:
    """Return the name without the suffixes that say what kind of file it is."""
    name = path.name
    for suffix in (".gz", ".zst", *SUFFIXES):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def _named(files: Sequence[Path]) -> tuple[Corpus, ...]:
    """Give every file a name of its own that is a plain word."""
    corpora: dict[str, Corpus] = {}
    for file in files:
        stem = _HELD_OUT.sub("", _stem(file)) or _stem(file)
        word = re.sub(r"[^A-Za-z0-9_]+", "_", stem).strip("_") or "corpus"
        word = word if word[0].isalpha() else f"corpus_{word}"
        name = unused_name(word, corpora)
        corpora[name] = Corpus(name=name, path=file, is_text=is_text(file))
    return tuple(corpora.values())
