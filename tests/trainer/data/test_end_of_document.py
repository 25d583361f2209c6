import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.preprocess.prefix import Control
from keepwarm.trainer.data.preprocess.tokenize import tokenize
from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
from keepwarm.trainer.data.tokenizer import load_tokenizer
from keepwarm.trainer.errors import DataError
from tests.support.corpus import write_json_lines
from tests.support.tokenizer_files import KINDS, byte_level, unigram, word_level

HTML = ("</", "s>")
"""A merge whose result is an HTML tag of Gemma's vocabulary."""


def _beside(path: Path, **files: Any) -> Path:
    for name, fields in files.items():
        path.with_name(f"{name}.json").write_text(json.dumps(fields))
    return path


def _end(path: Path, named: str | int | None = None) -> str:
    import tokenizers

    return str(tokenizers.Tokenizer.from_file(str(path)).id_to_token(load_tokenizer(str(path), named).end_of_document))


def _tagged(folder: Path, special: tuple[str, ...] = ("<eos>",)) -> Path:
    return byte_level(folder, special, merges=(("<", "/"), ("s", ">"), HTML))


def test_end_of_document_ordinary_entry_of_that_name_is_passed_over(tmp_path: Path) -> None:
    assert _end(_tagged(tmp_path)) == "<eos>"


def test_end_of_document_ordinary_entry_is_taken_where_nothing_is_special(tmp_path: Path) -> None:
    assert _end(_tagged(tmp_path, ())) == "</s>"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "<|b|>"}}, "<|b|>"),
        ({"tokenizer_config": {"eos_token": {"content": "<|b|>", "lstrip": False}}}, "<|b|>"),
        ({"special_tokens_map": {"eos_token": {"content": "<|b|>"}}}, "<|b|>"),
        ({"tokenizer_config": {"eos_token": "<|b|>"}, "config": {"eos_token_id": 0}}, "<|b|>"),
        ({"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": 2}}, "<|b|>"),
        ({"generation_config": {"eos_token_id": [2]}, "config": {"eos_token_id": 0}}, "<|b|>"),
        ({"generation_config": {"eos_token_id": [1, 2]}}, "<eos>"),
        ({"config": {"eos_token_id": 50256}}, "<eos>"),
        ({"config": {"eos_token_id": 17}}, "<eos>"),
        ({"config": {"eos_token_id": "2"}}, "<eos>"),
        ({"config": {"eos_token_id": True}}, "<eos>"),
    ],
)
def test_end_of_document_is_what_the_files_beside_declare(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    path = byte_level(tmp_path, ("<|a|>", "<eos>", "<|b|>"))
    assert _end(_beside(path, **files)) == expected


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "</s> and <eos>, each of which may end a document: name it with --end-of-document"),
        ({"generation_config": {"eos_token_id": [1, 2]}}, "eos_token_id is"),
        (
            {"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<eos>"}},
            r"its eos_token is </s> in tokenizer_config\.json and <eos> in special_tokens_map\.json: name it",
        ),
        ({"tokenizer_config": {"eos_token": "<gone>"}}, r"tokenizer_config\.json: eos_token '<gone>' is not in"),
        ({"tokenizer_config": ["eos_token"]}, r"tokenizer_config\.json: not a JSON object"),
    ],
)
def test_end_of_document_ambiguous_is_refused_until_it_is_named(
    tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    path = _beside(byte_level(tmp_path, ("<|a|>", "</s>", "<eos>")), **files)
    with pytest.raises(DataError, match=words):
        load_tokenizer(str(path))
    if "not a JSON" not in words:
        assert _end(path, "<eos>") == "<eos>"
        assert _end(path, 1) == "</s>"


def test_end_of_document_unknown_name_is_refused(tmp_path: Path) -> None:
    path = byte_level(tmp_path)
    for named in ("<gone>", 9999):
        with pytest.raises(DataError, match=r"tokenizer\.json: has no token"):
            load_tokenizer(str(path), named)
    with pytest.raises(DataError, match="bytes have no token '</s>'"):
        load_tokenizer("bytes", "</s>")


def test_end_of_document_named_is_written_and_recorded(tmp_path: Path) -> None:
    path = byte_level(tmp_path, ("<|begin|>", "<｜end▁of▁sentence｜>"))  # noqa: RUF001
    corpus = write_json_lines(tmp_path / "a.jsonl", ["one", "two"])
    tokenize([corpus], tmp_path / "own", str(path))
    tokenize([corpus], tmp_path / "named", str(path), TextOptions(end_of_document="<|begin|>"))
    for prefix, end in (("own", 1), ("named", 0)):
        tokens = TokenFile(tmp_path / prefix)
        assert tokens.sidecar is not None
        assert tokens.sidecar.end_of_document == end
        assert [int(tokens.document(index)[-1]) for index in range(2)] == [end, end]


# ---- control tokens never come from text


CONTROL = {
    "</s>": "a </s> b",
    "at the start": "</s>",
    "twice": "</s> a </s>",
    "through a normaliser": "a ＜/ｓ＞ b",  # noqa: RUF001
}


@pytest.mark.parametrize("text", CONTROL.values(), ids=CONTROL)
@pytest.mark.parametrize("kind", ["unigram", "word level", "word piece"])
def test_control_token_in_text_is_ordinary_text(tmp_path: Path, kind: str, text: str) -> None:
    tokenizer = load_tokenizer(str(KINDS[kind](tmp_path, ("</s>",))))
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.end_of_document not in ids
    assert len(ids) >= len(text.split())
    if kind == "unigram":
        assert tokenizer.decode(ids) == text.replace("＜/ｓ＞", "</s>")  # noqa: RUF001
    assert tokenizer.encode_marked("</s>") == [tokenizer.end_of_document]


def test_control_token_that_is_no_added_token_is_ordinary_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(unigram(tmp_path, ())))
    (ids,) = tokenizer.encode_batch(["a </s> b"])
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == "a </s> b"


def test_control_token_declared_beside_is_ordinary_text(tmp_path: Path) -> None:
    path = _beside(unigram(tmp_path), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = load_tokenizer(str(path))
    (ids,) = tokenizer.encode_batch(["a <s> b"])
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a <s> b"


def test_control_token_that_merges_make_is_ordinary_text(tmp_path: Path) -> None:
    path = _tagged(tmp_path, ("</s>",))
    tokenizer = load_tokenizer(str(path))
    (ids,) = tokenizer.encode_batch(["a </s> b"])
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == "a </s> b"


def _as_ordinary_added_token(path: Path) -> None:
    described = json.loads(path.read_text())
    for token in described["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(described))


@pytest.mark.parametrize("make", [byte_level, unigram, word_level])
def test_control_token_added_without_being_special_is_ordinary_text(tmp_path: Path, make: Callable[..., Path]) -> None:
    path = make(tmp_path, ("<eos>",))
    _as_ordinary_added_token(path)
    tokenizer = load_tokenizer(str(path), "<eos>")
    (ids,) = tokenizer.encode_batch(["a <eos> b"])
    assert tokenizer.end_of_document not in ids


def test_other_texts_keep_the_ids_of_the_library(tmp_path: Path) -> None:
    import tokenizers

    path = unigram(tmp_path)
    texts = ["a b", "</s>", "text with words", "über"]
    encoded = load_tokenizer(str(path)).encode_batch(texts)
    library = tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    plain = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ours == theirs for ours, theirs in zip(encoded, plain, strict=True)] == [True, False, True, True]


def test_unknown_text_that_would_end_a_document_is_refused(tmp_path: Path) -> None:
    path = word_level(tmp_path, ("</s>",), unknown="</s>")
    corpus = write_json_lines(tmp_path / "a.jsonl", ["a b", "a stranger"])
    with pytest.raises(DataError, match=r"a\.jsonl, from line 1: .*its token for unknown text ends documents"):
        tokenize([corpus], tmp_path / "out", str(path))


@pytest.mark.parametrize(("unknown", "good"), [("[UNK]", "</s>"), ("</s>", "<|good|>")])
def test_control_prefix_that_would_end_a_document_is_refused(tmp_path: Path, unknown: str, good: str) -> None:
    path = word_level(tmp_path, ("</s>",), unknown=unknown)
    (tmp_path / "a.jsonl").write_text('{"text": "a b", "score": 1}\n')
    prefix = Control(key="score", least=0, good=good, bad="a", unmarked=0)
    with pytest.raises(DataError, match=rf"{re.escape(f'--control {good}')}: gives the end-of-document token"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", str(path), TextOptions(prefix=prefix))


def test_sentence_piece_symbol_that_text_can_give_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(["a few words of text"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=30,
        hard_vocab_limit=False,
        user_defined_symbols=["</s>", "<x>"],
        control_symbols=["<end>"],
        minloglevel=2,
    )
    name = str(tmp_path / "m.model")
    with pytest.raises(DataError, match="a text contains </s>, which ends documents"):
        load_tokenizer(name, "</s>").encode_batch(["a </s> b"])
    tokenizer = load_tokenizer(name, "<end>")
    (ids,) = tokenizer.encode_batch(["a <end> b"])
    assert tokenizer.end_of_document not in ids
    for named in ("<gone>", "<unk>", 999):
        with pytest.raises(DataError, match="has no token"):
            load_tokenizer(name, named)


def test_largest_id_leaves_out_added_tokens_that_no_text_gives(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(byte_level(tmp_path, ("<|endoftext|>",))))
    assert (tokenizer.largest_id, tokenizer.vocabulary_size) == (256, 257)
    path = unigram(tmp_path / "more", ("</s>", "<|unused|>"))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.vocabulary_size == tokenizer.largest_id + 2
    assert np.array(tokenizer.encode_batch(["<|unused|>"])).max() <= tokenizer.largest_id
