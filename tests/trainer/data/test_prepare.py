import json
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepwarm.trainer.data.preprocess import prepare
from keepwarm.trainer.data.preprocess.prepare import prepare_sources
from keepwarm.trainer.data.preprocess.tokenize import tokenize
from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from keepwarm.trainer.data.spec import DataSpec
from keepwarm.trainer.errors import DataError, OutputError
from tests.support.corpus import random_documents, write_json_lines, write_token_file
from tests.support.tokenizer_files import byte_level

CORPORA = Path("configs/corpora")


def _data(**changes: Any) -> DataSpec:
    return DataSpec.model_validate({"sequence_length": 64, **changes})


def test_prepare_text_and_token_files_work_side_by_side(tmp_path: Path) -> None:
    tokens = write_token_file(tmp_path / "tokens", random_documents(1, 50))
    data = _data(
        sources={"de": str(CORPORA / "handbook_de.valid.jsonl.zst"), "raw": str(tokens)},
        validation={"de": str(CORPORA / "handbook_de.valid.jsonl.zst")},
        document_mask=True,
    )
    prepared = prepare_sources(data, 257, tmp_path / "cache")
    assert set(prepared.sources) == {"de", "raw"}
    assert set(prepared.validation) == {"de"}
    window = prepared.sources["de"].windows(np.array([0]))
    assert bytes(window.tokens[0].tolist()).startswith(b"9.11.4. Ein konkretes Beispiel")
    assert window.documents is not None
    assert prepared.sources["de"].identity == prepared.validation["de"].identity


def test_prepare_text_is_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["hello world " * 20])
    data = _data(sources={"a": str(corpus)})
    first = prepare_sources(data, 257, tmp_path / "cache").sources["a"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "tokenize", None)
        again = prepare_sources(data, 257, tmp_path / "cache").sources["a"]
    assert again.identity == first.identity
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == files
    corpus.write_text(corpus.read_text().replace("hello", "other"))
    assert prepare_sources(data, 257, tmp_path / "cache").sources["a"].identity != first.identity


def _identity(arguments: tuple[DataSpec, Path]) -> str:
    return prepare_sources(arguments[0], 257, arguments[1]).sources["a"].identity


def test_prepare_concurrent_ranks_tokenize_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["hello world " * 20])
    data, calls = _data(sources={"a": str(corpus)}), []
    monkeypatch.setattr(prepare, "tokenize", lambda *a, **k: (calls.append(a), tokenize(*a, **k))[1])
    with ThreadPool(4) as pool:
        identities = pool.map(_identity, [(data, tmp_path / "cache")] * 4)
    assert len(set(identities)) == 1
    assert len(calls) == 1


def test_prepare_lock_wait_has_a_deadline(tmp_path: Path) -> None:
    with (
        prepare._lock(tmp_path / "x.lock", 1),
        pytest.raises(DataError, match=r"x\.lock: waited 0 s"),
        prepare._lock(tmp_path / "x.lock", 0),
    ):
        pass


@pytest.mark.parametrize("section", ["sources", "validation"])
@pytest.mark.parametrize("path", ["gone", "gone.jsonl"])
def test_prepare_missing_file_is_named_with_its_key(tmp_path: Path, section: str, path: str) -> None:
    tokens = write_token_file(tmp_path / "tokens", random_documents(1, 50))
    parts: dict[str, dict[str, str]] = {"sources": {"good": str(tokens)}}
    parts.setdefault(section, {})["en"] = str(tmp_path / path)
    with pytest.raises(DataError, match=rf"^data\.{section}\.en: .*gone\S*: no such file"):
        prepare_sources(_data(**parts), 257, tmp_path / "cache")


def test_prepare_vocabulary_larger_than_model_is_refused(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["hello world " * 20])
    with pytest.raises(
        DataError, match=r"data\.tokenizer: bytes has a vocabulary of 257.*model\.vocabulary_size = 256"
    ):
        prepare_sources(_data(sources={"a": str(corpus)}), 256, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_prepare_mixed_tokenizers_are_refused(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["hello world " * 20])
    train_tokenizer([corpus], tmp_path / "t.json", 260)
    tokenize([corpus], tmp_path / "bpe", str(tmp_path / "t.json"))
    tokenize([corpus], tmp_path / "bytes", "bytes")
    data = _data(sources={"a": str(tmp_path / "bpe"), "b": str(tmp_path / "bytes")}, sequence_length=4)
    with pytest.raises(DataError, match=r"data\.sources\.b: made with another tokenizer than data\.sources\.a"):
        prepare_sources(data, 1000, tmp_path / "cache")
    data = _data(sources={"b": str(tmp_path / "bytes")}, sequence_length=4, tokenizer=str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"data\.sources\.b: made with another tokenizer than data\.tokenizer"):
        prepare_sources(data, 1000, tmp_path / "cache")


def test_prepare_sources_that_end_documents_differently_are_refused(tmp_path: Path) -> None:
    path = str(byte_level(tmp_path / "t", ("<|endoftext|>", "<|begin|>")))
    corpus = write_json_lines(tmp_path / "a.jsonl", ["hello world " * 20])
    tokenize([corpus], tmp_path / "other", path, TextOptions(end_of_document="<|begin|>"))
    sources = {"a": str(corpus), "b": str(tmp_path / "other")}
    data = _data(sources=sources, tokenizer=path)
    with pytest.raises(DataError, match=r"data\.sources\.b: its documents end with token 1, those of data\.tokenizer"):
        prepare_sources(data, 1000, tmp_path / "cache")
    data = _data(sources=sources, tokenizer=path, end_of_document="<|begin|>")
    prepared = prepare_sources(data, 1000, tmp_path / "cache")
    assert int(prepared.sources["a"].tokens.read(240, 1)[0]) == 1


def test_prepare_added_token_beyond_the_model_counts_where_text_has_it(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "t")
    described = json.loads(path.read_text())
    extra = {"id": 257, "content": "<tool>", "special": False, "normalized": False}
    described["added_tokens"].append({**described["added_tokens"][0], **extra})
    path.write_text(json.dumps(described))
    corpus = write_json_lines(tmp_path / "a.jsonl", ["hello world " * 20])
    data = _data(sources={"a": str(corpus)}, tokenizer=str(path))
    assert prepare_sources(data, 257, tmp_path / "cache").sources["a"].size
    write_json_lines(corpus, ["hello <tool> world " * 20])
    with pytest.raises(DataError, match=r"data\.sources\.a: .*token id 257 is outside model\.vocabulary_size = 257"):
        prepare_sources(data, 257, tmp_path / "cache")


def test_prepare_source_shorter_than_a_sample_is_named(tmp_path: Path) -> None:
    tokens = write_token_file(tmp_path / "tokens", [[1] * 64])
    with pytest.raises(DataError, match=r"data\.sources\.a: .*64 tokens are too few .*sequence_length = 64"):
        prepare_sources(_data(sources={"a": str(tokens)}), 257, tmp_path / "cache")


def test_prepare_unwritable_cache_is_named(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["hello world " * 20])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"data\.sources\.a: .*file.*cannot write"):
        prepare_sources(_data(sources={"a": str(corpus)}), 257, tmp_path / "file" / "cache")
