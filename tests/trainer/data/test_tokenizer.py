import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.trainer.data.preprocess.text import documents, parts
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from keepwarm.trainer.data.tokenizer import Tokenizer, load_tokenizer
from keepwarm.trainer.errors import DataError, OutputError

CORPORA = Path("configs/corpora")
TEXTS = [
    "",
    "plain",
    "Umlaute: äöüß, Ελληνικά, 漢字, 🙂",
    " leading and trailing \n\n",
    "a literal <|endoftext|> and </s>",
]


@pytest.fixture(scope="module")
def german() -> list[str]:
    (part,) = parts(CORPORA / "handbook_de.valid.jsonl.zst", 1 << 30)
    return documents(part, "text")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    assert train_tokenizer([CORPORA / "handbook_de.valid.jsonl.zst"], path, 400) == 400
    return load_tokenizer(str(path))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory, german: list[str]) -> Tokenizer:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in german for line in text.splitlines()[:40]),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(str(path))


@given(st.text())
def test_tokenizer_bytes_round_trips_any_text(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text
    assert max(ids, default=0) < tokenizer.end_of_document < tokenizer.vocabulary_size


@pytest.mark.parametrize("kind", ["bpe", "sentence_piece"])
def test_tokenizer_round_trips(kind: str, request: pytest.FixtureRequest, german: list[str]) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    texts = TEXTS + german
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text
        assert max(ids, default=0) < tokenizer.vocabulary_size
        assert tokenizer.end_of_document not in ids


def test_tokenizer_bpe_compresses(bpe: Tokenizer, german: list[str]) -> None:
    assert sum(map(len, bpe.encode_batch(german))) < 0.7 * sum(len(text.encode()) for text in german)


def test_tokenizer_vocabulary_size_covers_every_id(bpe: Tokenizer) -> None:
    assert bpe.vocabulary_size == 400
    assert bpe.decode([bpe.vocabulary_size - 1])


def test_tokenizer_hash_follows_content_not_path(tmp_path: Path, bpe: Tokenizer) -> None:
    raw = Path(bpe.name).read_text()
    (tmp_path / "copy.json").write_text(raw)
    (tmp_path / "other.json").write_text(raw + " ")
    assert load_tokenizer(str(tmp_path / "copy.json")).hash == bpe.hash
    assert load_tokenizer(str(tmp_path / "other.json")).hash != bpe.hash


def test_tokenizer_truncation_and_padding_are_ignored(tmp_path: Path, bpe: Tokenizer) -> None:
    described = json.loads(Path(bpe.name).read_text())
    described["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(described))
    text = "Das Debian-System wird mit vielen Paketen geliefert."
    assert load_tokenizer(str(path)).encode_batch([text]) == bpe.encode_batch([text])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.json", None, "no such tokenizer file"),
        ("tokenizer.txt", b"x", "not a tokenizer"),
        ("broken.json", b"{", "not a tokenizer.json"),
        ("broken.model", b"\xff\xff\xff", "not a SentencePiece model"),
    ],
)
def test_tokenizer_invalid_file_is_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as raised:
        load_tokenizer(str(path))
    assert str(path) in str(raised.value)


def test_tokenizer_without_end_of_document_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(Path(bpe.name).read_text().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(DataError, match="known end-of-document tokens"):
        load_tokenizer(str(path))


def test_train_tokenizer_is_repeatable(tmp_path: Path, bpe: Tokenizer) -> None:
    train_tokenizer([CORPORA / "handbook_de.valid.jsonl.zst"], tmp_path / "again.json", 400)
    assert load_tokenizer(str(tmp_path / "again.json")).hash == bpe.hash


def test_train_tokenizer_impossible_request_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    corpus = CORPORA / "handbook_de.valid.jsonl.zst"
    with pytest.raises(DataError, match="--vocabulary-size 257"):
        train_tokenizer([corpus], tmp_path / "t.json", 257)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([tmp_path / "empty.jsonl"], tmp_path / "t.json", 300)
    with pytest.raises(OutputError, match=r"use \.json"):
        train_tokenizer([corpus], tmp_path / "t.model", 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl"]
    (tmp_path / "t.json").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        train_tokenizer([corpus], tmp_path / "t.json", 300)
