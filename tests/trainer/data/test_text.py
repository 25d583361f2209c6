import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.data.preprocess.text import TextPart, documents, is_text, parts
from keepwarm.trainer.errors import DataError

LINES = b"".join(json.dumps({"text": f"document {i} " + "x" * (i * 7 % 50)}).encode() + b"\n" for i in range(40))
TEXTS = [json.loads(line)["text"] for line in LINES.splitlines()]


def _write(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        raw = gzip.compress(raw)
    elif name.endswith(".zst"):
        # Two frames, as from `cat a.zst b.zst`.
        raw = zstandard.compress(raw[: len(raw) // 2]) + zstandard.compress(raw[len(raw) // 2 :])
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("part_bytes", [1, 100, 10**6])
def test_text_json_lines_come_back_in_order(tmp_path: Path, name: str, part_bytes: int) -> None:
    path = _write(tmp_path, name, LINES)
    found = list(parts(path, part_bytes))
    assert [text for part in found for text in documents(part, "text")] == TEXTS
    assert found[-1].read_bytes == path.stat().st_size
    assert len(found) == (1 if part_bytes > len(LINES) else len({part.first_line for part in found}))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_text_plain_file_is_one_document(tmp_path: Path, name: str) -> None:
    (part,) = parts(_write(tmp_path, name, "Grüße\n\nzwei".encode()), 1)
    assert documents(part, "text") == ["Grüße\n\nzwei"]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(max_size=20), max_size=20), st.integers(1, 200), st.booleans())
def test_text_parts_are_whole_lines_at_any_size(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], part_bytes: int, last_newline: bool
) -> None:
    raw = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n" * last_newline
    path = _write(tmp_path_factory.mktemp("lines"), "a.jsonl", raw.encode())
    found = list(parts(path, part_bytes))
    assert b"".join(part.payload for part in found) == raw.encode()
    assert [text for part in found for text in documents(part, "text")] == [text for text in texts if text]
    lines_before = 0
    for part in found:
        assert part.first_line == lines_before + 1
        lines_before += part.payload.count(b"\n")


def test_text_other_key_and_blank_lines_are_read(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.jsonl", b'{"body": "one"}\n\n  \n{"body": ""}\n{"body": "two"}')
    (part,) = parts(path, 10**6)
    assert documents(part, "body") == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b'["text"]', "not an object"),
        (b'{"body": "x"}', r"--text-key\); its keys are \['body'\]"),
        (b'{"text": 3}', "not an object with a string"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud83d"}', "not text"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_text_bad_line_is_named(line: bytes, words: str) -> None:
    payload = b'{"text": "good"}\n' * 2 + line + b"\n"
    with pytest.raises(DataError, match=words) as raised:
        documents(TextPart("data/a.jsonl", True, 11, payload, 0), "text")
    assert str(raised.value).startswith("data/a.jsonl:13: ")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("cut", [1, 9, 60])
def test_text_truncated_archive_is_named(tmp_path: Path, name: str, cut: int) -> None:
    path = _write(tmp_path, name, LINES)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match="damaged or truncated") as raised:
        list(parts(path, 10**6))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_text_invalid_archive_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(LINES)
    with pytest.raises(DataError, match="damaged or truncated"):
        list(parts(path, 10**6))


def test_text_unknown_kind_or_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("a.csv", "a.gz", "a"):
        assert not is_text(name)
        with pytest.raises(DataError, match="unknown kind"):
            list(parts(tmp_path / name, 1))
    assert is_text("x/a.jsonl.zst")
    with pytest.raises(DataError, match="No such file"):
        list(parts(tmp_path / "gone.jsonl", 1))
