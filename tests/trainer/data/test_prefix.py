"""Text before documents: which, how it lies in the file, and that it carries no loss."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.data.preprocess.prefix import Control, metadata
from keepwarm.trainer.data.preprocess.progress import Observer
from keepwarm.trainer.data.preprocess.token_parts import merge, part_path, write_part
from keepwarm.trainer.data.preprocess.tokenize import command, tokenize
from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from keepwarm.trainer.data.tokenizer import load_tokenizer
from keepwarm.trainer.errors import DataError, SpecError
from tests.support.corpus import MemoryTokens
from tests.support.foreign.megatron_tokens import megatron_indexed

LINES = [{"text": f"text {place}", "url": f"site{place % 3}.org", "nice": place / 10} for place in range(10)]


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", LINES)


def documents(prefix: Path) -> list[str]:
    file = TokenFile(prefix)
    return [bytes(file.document(index)[:-1].tolist()).decode() for index in range(file.documents)]


def without_loss(prefix: Path) -> list[str]:
    """What carries no loss, from the beginning of the file to its end."""
    file = TokenFile(prefix)
    return [bytes(file.read(low, high - low).tolist()).decode() for low, high in file.prefixes_between(0, file.count)]


def test_prefix_metadata_is_a_sequence_before_each_document(corpus: Path, tmp_path: Path) -> None:
    command([corpus], tmp_path / "out", prefix=r"URL: {url}\n\n", processes=1)
    expected = [f"URL: site{place % 3}.org\n\n" for place in range(10)]
    assert documents(tmp_path / "out") == [f"{url}text {place}" for place, url in enumerate(expected)]
    assert without_loss(tmp_path / "out") == expected
    dataset = megatron_indexed().IndexedDataset(str(tmp_path / "out"))
    assert len(dataset) == 20
    assert dataset.document_indices.tolist() == list(range(0, 22, 2))
    sidecar = TokenFile(tmp_path / "out").sidecar
    assert sidecar is not None
    assert sidecar.prefixed == sidecar.documents == 10


def test_prefix_absent_file_has_none(corpus: Path, tmp_path: Path) -> None:
    tokenize([corpus], tmp_path / "out", "bytes")
    assert without_loss(tmp_path / "out") == []


def test_control_tokens_follow_score_and_skip_some_documents(corpus: Path, tmp_path: Path) -> None:
    before = Control(key="nice", least=0.5, good="+", bad="-", unmarked=0.3)
    tokenize([corpus], tmp_path / "out", "bytes", TextOptions(prefix=before))
    tokenize([corpus], tmp_path / "parts", "bytes", TextOptions(prefix=before, part_bytes=16))
    assert documents(tmp_path / "out") == documents(tmp_path / "parts")
    marks = [document.removesuffix(f"text {place}") for place, document in enumerate(documents(tmp_path / "out"))]
    assert 1 <= marks.count("") <= 6
    assert all(mark in ("", "+" if place >= 5 else "-") for place, mark in enumerate(marks))
    assert without_loss(tmp_path / "out") == [mark for mark in marks if mark]


def test_control_tokens_are_special_tokens(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], tmp_path / "t.json", 300, special=["<|good|>", "<|bad|>"])
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    good, bad = (tokenizer.encode_marked(mark) for mark in ("<|good|>", "<|bad|>"))
    assert len(good) == len(bad) == 1
    assert good != bad
    write(corpus, [{"text": "<|good|>", "url": "<|endoftext|>", "nice": 1}])
    tokenize([corpus], tmp_path / "url", tokenizer.name, TextOptions(prefix=metadata("{url}")))
    whole = TokenFile(tmp_path / "url").document(0)
    assert tokenizer.end_of_document not in whole[:-1]
    assert good[0] not in whole
    command([corpus], tmp_path / "control", tokenizer.name, control_key="nice", unmarked=0.0, processes=1)
    assert TokenFile(tmp_path / "control").document(0)[0] == good[0]
    assert good[0] not in TokenFile(tmp_path / "control").document(0)[1:]


pieces = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(pieces, st.integers(1, 6), st.booleans())
def test_prefix_targets_are_masked_token_by_token(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]], length: int, masked: bool
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    corpus = write(folder / "a.jsonl", [{"p": "p" * before, "text": "t" * after} for before, after in lengths])
    tokenize([corpus], folder / "out", "bytes", TextOptions(prefix=metadata("{p}")))
    file = TokenFile(folder / "out")
    stream = file.read(0, file.count)
    if file.count <= length:
        return
    plain = PackedSource("x", MemoryTokens(tuple(tuple(file.document(at).tolist()) for at in range(file.documents))),
                         length, masked)  # fmt: skip
    source = PackedSource("x", file, length, masked)
    windows = np.arange(source.size)
    found, expected = source.windows(windows), plain.windows(windows)
    shown = stream[1 : 1 + source.size * length].reshape(-1, length)
    assert np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(found.targets, np.where(shown == ord("p"), IGNORED, expected.targets))


def test_prefix_parts_of_another_prefix_are_not_reused(corpus: Path, tmp_path: Path) -> None:
    from keepwarm.trainer.data.preprocess.text import Selection, parts

    tokenizer = load_tokenizer("bytes")
    (one,) = parts(corpus, 1 << 20, Selection(prefix=metadata("{url}")))
    (two,) = parts(corpus, 1 << 20)
    paths = [part_path(tmp_path, part, tokenizer, "text") for part in (one, two)]
    assert paths[0] != paths[1]
    for path, part in zip(paths, (one, two), strict=True):
        write_part(path, part, tokenizer, "text")
    assert merge(tmp_path, paths, tmp_path / "out", tokenizer, Observer()).prefixed == 10


@pytest.mark.parametrize("value", ["true", "null", "[1]"])
def test_prefix_document_without_field_is_named(corpus: Path, tmp_path: Path, value: str) -> None:
    corpus.write_text(corpus.read_text() + f'{{"text": "x", "url": {value}, "nice": {value}}}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:11: no text or number at 'url' \(--prefix\)"):
        tokenize([corpus], tmp_path / "out", "bytes", TextOptions(prefix=metadata("{url}")))
    with pytest.raises(DataError, match=r"corpus\.jsonl:11: no number at 'nice' \(--control-key\)"):
        tokenize(
            [corpus],
            tmp_path / "out",
            "bytes",
            TextOptions(prefix=Control(key="nice", least=0, good="+", bad="-", unmarked=0)),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "URL"}, "name at least one key"),
        ({"prefix": "{}"}, "name at least one key"),
        ({"prefix": "{url.secret}"}, "name at least one key"),
        ({"prefix": "{url"}, "--prefix"),
        ({"prefix": "{url}", "control_key": "nice"}, "give one of them"),
        ({"control_key": "nice", "control": "+"}, "two different texts"),
        ({"control_key": "nice", "control": "+,+"}, "two different texts"),
    ],
)
def test_prefix_invalid_options_are_refused(
    corpus: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        command([corpus], tmp_path / "out", processes=1, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out.idx").exists()


def test_prefix_plain_text_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("text")
    with pytest.raises(DataError, match="plain text has no fields"):
        tokenize([plain], tmp_path / "out", "bytes", TextOptions(prefix=metadata("{url}")))
