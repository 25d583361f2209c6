import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.data.preprocess import compressed
from keepwarm.trainer.data.preprocess import text as text_module
from keepwarm.trainer.data.preprocess.text import Selection, TextPart, documents, is_text, parts, prefixed_documents
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
    with pytest.raises(DataError, match="truncated: the file ends inside a") as raised:
        list(parts(path, 10**6))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_text_invalid_archive_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(LINES)
    with pytest.raises(DataError, match=f"damaged, or not {name[-3:].strip('.')}"):
        list(parts(path, 10**6))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.Jsonl.GZ", "a.NDJSON.zst"])
def test_text_suffix_in_any_case_is_known(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    packed = {"gz": gzip.compress(LINES), "zst": zstandard.compress(LINES)}
    path.write_bytes(packed.get(name.rpartition(".")[2].lower(), LINES))
    assert is_text(path)
    assert [text for part in parts(path, 10**6) for text in documents(part, "text")] == TEXTS


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}', ["one", "two"]),
        ("a.jsonl", b'{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n', ["one", "two"]),
        ("a.jsonl", b'\xef\xbb\xbf  \n{"text": "one"}\n', ["one"]),
        ("a.jsonl", b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n', ["one", "two"]),
        ("a.jsonl", '{"text": "\u2028one"}\n'.encode(), ["\u2028one"]),
        ("a.jsonl", b'{"text": "\\ud83d\\ude00", "other": "\\ud83d"}', ["\U0001f600"]),
        ("a.jsonl", b'{"text": "\\u0000one", "n": NaN}', ["\0one"]),
        ("a.txt", b"\xef\xbb\xbfone", ["one"]),
        ("a.txt", b"\xef\xbb\xbf", []),
        ("a.txt", b"", []),
        ("a.txt", b"one\r\ntwo", ["one\r\ntwo"]),
    ],
)
def test_text_awkward_file_is_read(tmp_path: Path, name: str, raw: bytes, expected: list[str]) -> None:
    found = [text for part in parts(_write(tmp_path, name, raw), 10**6) for text in documents(part, "text")]
    assert found == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_text_other_encoding_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    path = _write(tmp_path, name, '{"text": "some words"}\n'.encode(encoding))
    with pytest.raises(DataError, match="UTF-16") as raised:
        list(parts(path, 10**6, Selection(skip_bad_lines=True)))
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", ['[\n{"text": "a"}\n]', '{\n  "text": "a"\n}'])
def test_text_json_file_that_is_not_line_by_line_is_explained(tmp_path: Path, content: str) -> None:
    (part,) = parts(_write(tmp_path, "a.json", content.encode()), 10**6)
    with pytest.raises(DataError, match=r"a\.json:1: not JSON: .*read line by line"):
        documents(part, "text")


def test_text_bad_lines_are_skipped_and_named(tmp_path: Path) -> None:
    bad = [b"{", b'["text"]', b'{"body": 1}', b'{"text": "\xff"}', b'{"text": "\\ud83d"}', b"[" * 10**5, b'{"n": %s}']
    bad[-1] %= b"9" * 5000
    raw = b"".join(line + b'\n{"text": "good"}\n' for line in bad)
    (part,) = parts(_write(tmp_path, "a.jsonl", raw), 10**6, Selection(skip_bad_lines=True))
    pairs, left_out = prefixed_documents(part, "text")
    assert pairs == [("", "good")] * len(bad)
    assert [one.offset for one in left_out] == [2 * index for index in range(len(bad))]
    reasons = ["not JSON", "not an object", "no", "not UTF-8", "surrogate", "nested too deep", "more than 4,300 digits"]
    assert all(word in one.reason for word, one in zip(reasons, left_out, strict=True))
    assert not any(part.path in one.reason for one in left_out)


def test_text_keys_of_a_bad_line_are_shown_short(tmp_path: Path) -> None:
    keys = {"k" * 10**6: 1, "\ud83d": 2, "a\n\0": 3} | {f"z{index}": 0 for index in range(100)}
    (part,) = parts(_write(tmp_path, "a.jsonl", json.dumps(keys).encode()), 10**8)
    with pytest.raises(DataError) as raised:
        documents(part, "text")
    assert len(str(raised.value)) < 500
    assert str(raised.value).isprintable()
    assert "and 95 more" in str(raised.value)


def _with_window(raw: bytes, log: int) -> bytes:
    """One frame whose header asks for a window of 2^log bytes, as `zstd --long` writes it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(raw) + packer.flush()


@pytest.mark.parametrize("log", [27, 31])
def test_text_zstandard_with_a_large_window_is_read(tmp_path: Path, log: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(_with_window(LINES, log) * 2)
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << log
    assert [text for part in parts(path, 10**6) for text in documents(part, "text")] == TEXTS * 2


def test_text_zstandard_window_above_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "WINDOW_LIMIT", 1 << 26)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(_with_window(LINES, 27))
    with pytest.raises(DataError, match=r"a window of 134,217,728 bytes .* more than the 67,108,864 that are read"):
        list(parts(path, 10**6))


def test_text_zstandard_of_equal_bytes_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(bytes(1 << 30), 1))
    with path.open("rb") as raw:
        largest = max(len(chunk) for chunk in compressed.chunks(path, raw))
    assert largest <= 1 << 29


def test_text_skippable_frames_and_members_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    path.write_bytes(skippable + zstandard.compress(LINES) + skippable)
    assert [text for part in parts(path, 10**6) for text in documents(part, "text")] == TEXTS
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]) + bytes(16))
    assert [text for part in parts(path, 10**6) for text in documents(part, "text")] == TEXTS


def test_text_document_beyond_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "DOCUMENT_BYTES", 1000)
    for name, raw in (("a.txt", b"x" * 1001), ("a.jsonl", b"x" * 1102)):
        with pytest.raises(DataError, match="more than 1,000 bytes"):
            list(parts(_write(tmp_path, name, raw), 100))


def test_text_unknown_kind_or_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("a.csv", "a.gz", "a"):
        assert not is_text(name)
        with pytest.raises(DataError, match="unknown kind"):
            list(parts(tmp_path / name, 1))
    assert is_text("x/a.jsonl.zst")
    with pytest.raises(DataError, match="No such file"):
        list(parts(tmp_path / "gone.jsonl", 1))


def test_text_bytes_of_no_encoding_within_a_file_are_not_called_utf_16(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\xff\xfe{"text": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8: .*byte 0xff"):
        [list(documents(part, "text")) for part in parts(path, 10**6)]
