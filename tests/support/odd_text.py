"""Drawn text files, most of them odd, and what is known about the documents in them."""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zstandard

SPECIAL = ("</s>", "<s>", "<unk>", "[UNK]", "[SEP]", "<|endoftext|>", "<|good|>", "<eos>", "＜/ｓ＞")  # noqa: RUF001
PIECES = (
    *SPECIAL,
    "", " ", "  ", "\n", "\r\n", "\t", "\0", "\x1b[0m", "\x7f", "\u2028", "\ufeff", "\ufffe", "a", "b", "text",
    "words", "über", "漢字", "🙂", "e\u0301", "\u202e", "x" * 300,
    "{url}", "%s", "\\n", "\\ud83d", '"', "▁", "Ġ", "##a",
)  # fmt: skip
LETTERS = "abc </s>|"


@dataclass
class OddFile:
    """A file, and what a reader must find in it."""

    name: str
    raw: bytes
    documents: list[str] | None = None
    """The texts of all good lines in order; None: unknown."""
    bad: int = 0
    """Lines that are no document."""
    readable: bool = True
    """Whether the file as a whole can be read; otherwise it must be refused."""


def drawn_text(draw: random.Random) -> str:
    match draw.randrange(4):
        case 0:
            return "".join(draw.choice(LETTERS) for _ in range(draw.randrange(20)))
        case 1:
            return "".join(chr(_code(draw)) for _ in range(draw.randrange(12)))
        case _:
            return "".join(draw.choice(PIECES) for _ in range(draw.randrange(8)))


def _code(draw: random.Random) -> int:
    code = draw.randrange(draw.choice((0x80, 0x800, 0x10000, 0x110000)))
    return code if not 0xD800 <= code < 0xE000 else 0x41


def drawn_file(draw: random.Random) -> OddFile:
    """Return a file of JSON lines or of plain text, perhaps compressed, perhaps damaged."""
    file = _plain(draw) if draw.random() < 0.15 else _json_lines(draw)
    _encode(draw, file)
    _compress(draw, file)
    if draw.random() < 0.3:
        file.name = file.name.upper()
    return file


def _plain(draw: random.Random) -> OddFile:
    text = drawn_text(draw)
    mark = draw.random() < 0.3
    # A mark at the beginning is none of the text's own.
    text = text.lstrip("\ufeff")
    raw = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    return OddFile("a.txt", raw, [text] if text else [])


def _json_lines(draw: random.Random) -> OddFile:
    file = OddFile(draw.choice(("a.jsonl", "a.ndjson", "a.json")), b"", [])
    assert file.documents is not None
    faulty = draw.random() < 0.4
    lines = []
    for _ in range(draw.randrange(12)):
        if draw.random() < 0.1:
            lines.append(draw.choice((b"", b"  ", b"\t")))
        elif faulty and draw.random() < 0.3:
            lines.append(_bad_line(draw))
            file.bad += 1
        else:
            text = drawn_text(draw)
            lines.append(_good_line(draw, text))
            file.documents += [text] if text else []
    end = draw.choice((b"\n", b"\r\n"))
    file.raw = end.join(lines) + (end if draw.random() < 0.7 else b"")
    if draw.random() < 0.2:
        file.raw = b"\xef\xbb\xbf" + file.raw
    return file


def _good_line(draw: random.Random, text: str) -> bytes:
    fields: list[tuple[str, Any]] = [("text", text), ("url", draw.choice(("u", 3, 1e300))), ("score", draw.random())]
    for _ in range(draw.randrange(3)):
        odd: tuple[Any, ...] = (
            None,
            True,
            10**400,
            -1,
            1.5,
            float("nan"),
            float("inf"),
            [[[]]],
            {"text": 3},
            "\ud83d",
            "\0" * 5,
        )
        fields.append((draw.choice(("", "Text", "text ", "\0", "\ud83d", "k" * 999)), draw.choice(odd)))
    draw.shuffle(fields)
    return json.dumps(dict(fields), ensure_ascii=draw.random() < 0.5).encode("utf-8", "backslashreplace")


def _bad_line(draw: random.Random) -> bytes:
    whole = _good_line(draw, "text")
    choices: tuple[Callable[[], bytes], ...] = (
        lambda: whole[: draw.randrange(1, len(whole))],
        lambda: whole + b"]",
        lambda: whole + whole,
        lambda: b"[" * draw.choice((1, 2000, 200_000)),
        lambda: b'{"a":' * draw.choice((1, 2000, 200_000)),
        lambda: b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
        lambda: b'{"text": "a", "n": [' + b"-" + b"1" * 5000 + b"]}",
        lambda: b'{"text": "\\ud83d"}',
        lambda: b'{"text": "a\\udc00b"}',
        lambda: b'{"text": "\xff"}',
        lambda: b'{"text": "\xed\xa0\xbd"}',
        lambda: b'{"text": "a\0b"}',
        lambda: b'{"text": null}',
        lambda: b'{"text": ["a"]}',
        lambda: b'{"TEXT": "a"}',
        lambda: b'["text"]',
        lambda: b"null",
        lambda: b'"text"',
        lambda: b"9" * 5000,
        lambda: b"NaN",
        lambda: b"{'text': 'a'}",
        lambda: b"\x1e{}",
    )
    return draw.choice(choices)()


def _encode(draw: random.Random, file: OddFile) -> None:
    if draw.random() > 0.08 or len(file.raw) < 8:
        return
    text = file.raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    encoding = draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-7"))
    file.raw = text.encode(encoding, "replace")
    file.documents, file.bad = None, 0
    # What is left of a plain text in one byte per character is text as well.
    file.readable = encoding != "utf-16"


def _compress(draw: random.Random, file: OddFile) -> None:
    match draw.randrange(8):
        case 0:
            file.name += ".gz"
            file.raw = b"".join(gzip.compress(piece, 1) for piece in _pieces(draw, file.raw))
        case 1 | 2:
            file.name += ".zst"
            file.raw = b"".join(_frame(draw, piece) for piece in _pieces(draw, file.raw)) or _frame(draw, b"")
        case _:
            return
    if draw.random() < 0.3:
        _damage(draw, file)


def _pieces(draw: random.Random, raw: bytes) -> list[bytes]:
    cuts = sorted(draw.randrange(len(raw) + 1) for _ in range(draw.randrange(3)))
    return [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


def _frame(draw: random.Random, raw: bytes) -> bytes:
    window = draw.choice((10, 15, 20, 27, 31 if draw.random() < 0.02 else 28))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window, write_checksum=draw.random() < 0.5, write_content_size=draw.random() < 0.5
    )
    if draw.random() < 0.5:
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return packer.compress(raw) + packer.flush()
    skippable = b"\x53\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    return skippable + zstandard.compress(raw, 1)


def _damage(draw: random.Random, file: OddFile) -> None:
    raw = bytearray(file.raw)
    match draw.randrange(3):
        case 0:
            file.raw = bytes(raw[: draw.randrange(len(raw))])
        case 1:
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            file.raw = bytes(raw)
        case 2:
            file.raw = bytes(raw) + draw.randbytes(draw.randrange(1, 9))
    # A cut between two frames, or a changed bit that no checksum covers, may go unseen.
    file.documents, file.bad, file.readable = None, 0, True
