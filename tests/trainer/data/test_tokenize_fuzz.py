"""Drawn text files through `keepwarm data tokenize`: no traceback, exit code 0 or 2, and the documents come back."""

import contextlib
import io
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.trainer import tool
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.preprocess.tokenize import app
from keepwarm.trainer.data.tokenizer import load_tokenizer
from tests.support.odd_text import OddFile, drawn_file
from tests.support.tokenizer_files import byte_level, unigram, word_level, word_piece

ORDINARY, LONG = 300, 10_000
EXACT = ("bytes", "byte level", "merging")
"""Tokenizers whose ids give the text back."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    merges = (("<", "/"), ("s", ">"), ("</", "s>"), ("t", "e"), ("x", "t"), ("te", "xt"))
    made = {
        "byte level": byte_level(folder / "byte"),
        "merging": byte_level(folder / "merging", ("</s>", "<|good|>"), merges),
        "unigram": unigram(folder / "unigram", ("<s>", "</s>")),
        "plain unigram": unigram(folder / "plain", ()),
        "word level": word_level(folder / "words"),
        "unknown ends": word_level(folder / "unknown", unknown="</s>"),
        "word piece": word_piece(folder / "pieces"),
    }
    return {"bytes": "bytes"} | {kind: str(path) for kind, path in made.items()}


def _run(*arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return exit code, stdout and stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tokenize", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            tool.run(app)
    finally:
        sys.argv = before
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def _options(draw: random.Random) -> list[str]:
    return draw.choice(
        (
            [], [], [], [],
            ["--prefix", "{url} "],
            ["--prefix", "{url:d}"],
            ["--prefix", "{gone}"],
            ["--score-key", "score", "--min-score", "0.5"],
            ["--score-key", "score", "--top", "0.5"],
            ["--score-key", "text", "--top", "0.5"],
            ["--control-key", "score", "--control-threshold", "0.5"],
            ["--text-key", "url"],
            ["--end-of-document", "</s>"],
            ["--end-of-document", "\0"],
        )
    )  # fmt: skip


def _one(seed: int, folder: Path, tokenizers: dict[str, str]) -> str:
    """Tokenize one drawn file, check what came of it, and return its fate."""
    draw = random.Random(seed)
    file, kind, options = drawn_file(draw), draw.choice([*tokenizers]), _options(draw)
    skip = draw.random() < 0.5
    path = folder / file.name
    path.write_bytes(file.raw)
    code, out, err = _run(
        "--input", str(path), "--output-prefix", f"{folder}/out", "--tokenizer", tokenizers[kind], *options,
        *(["--skip-bad-lines"] if skip else []),
    )  # fmt: skip
    assert code in (0, 2), err
    assert "Traceback" not in err
    if code:
        assert (out, err.count("\n"), err[:7]) == ("", 1, "error: "), err
        assert len(err) < 1500
        assert not [one for one in folder.iterdir() if one.name in ("out.bin", "out.idx", "out.json")]
        _check_refused(file, kind, options, skip, err)
        return "refused"
    assert file.readable
    assert skip or not file.bad
    _check_written(file, kind, tokenizers[kind], options, folder / "out")
    return "written"


def _check_refused(file: OddFile, kind: str, options: list[str], skip: bool, err: str) -> None:
    """Assert that there was a reason."""
    known = file.documents is not None and file.readable
    if not options and known and file.documents and kind != "unknown ends":
        assert file.bad, err
        assert not skip, err
        assert ":" in err


def _check_written(file: OddFile, kind: str, tokenizer_name: str, options: list[str], prefix: Path) -> None:
    named = options[1] if options[:1] == ["--end-of-document"] else None
    tokenizer, tokens = load_tokenizer(tokenizer_name, named), TokenFile(prefix)
    documents = [tokens.document(index).tolist() for index in range(tokens.documents)]
    assert documents
    assert all(ids[-1] == tokenizer.end_of_document for ids in documents)
    assert not any(tokenizer.end_of_document in ids[:-1] for ids in documents)
    assert tokens.sidecar is not None
    assert (tokens.sidecar.documents, tokens.sidecar.tokens) == (len(documents), tokens.count)
    if file.documents is None or (options and named is None):
        return
    assert tokens.sidecar.skipped == file.bad
    assert len(documents) == len(file.documents)
    if kind in EXACT:
        assert [tokenizer.decode(ids) for ids in documents] == file.documents


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    def fresh() -> Iterator[Path]:
        while True:
            (tmp_path / "one").mkdir()
            yield tmp_path / "one"
            shutil.rmtree(tmp_path / "one")

    return fresh()


def _campaign(seeds: range, folders: Iterator[Path], tokenizers: dict[str, str]) -> None:
    fates = []
    for seed in seeds:
        try:
            fates.append(_one(seed, next(folders), tokenizers))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert min(fates.count("written"), fates.count("refused")) > len(fates) / 5


def test_tokenize_odd_files_are_written_right_or_refused_in_one_sentence(
    folders: Iterator[Path], tokenizers: dict[str, str]
) -> None:
    _campaign(range(ORDINARY), folders, tokenizers)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_tokenize_many_odd_files_are_written_right_or_refused_in_one_sentence(
    folders: Iterator[Path], tokenizers: dict[str, str]
) -> None:
    _campaign(range(ORDINARY, ORDINARY + LONG), folders, tokenizers)
