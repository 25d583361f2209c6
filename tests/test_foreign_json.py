import pytest

from keepwarm.foreign_json import parse_json, shown_keys


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b"[Infinity]", [float("inf")]),
        (b'"\\u0000"', "\0"),
    ],
)
def test_json_of_others_is_read(raw: bytes, value: object) -> None:
    assert parse_json(raw) == value


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON: Expecting value at column 1"),
        (b'{\n"a": }', "not JSON: Expecting value at line 2, column 6"),
        (b"9" * 5000, "not JSON that can be read: an integer of more than 4,300 digits"),
        (b"[" * 10**5, "not JSON that can be read: nested too deep"),
        (b'{"a":' * 10**5, "not JSON that can be read: nested too deep"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte: byte 0xff at position 7"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16, not UTF-8: convert it"),
        ('{"a": 1}'.encode("utf-32"), "UTF-32, not UTF-8: convert it"),
        ('{"a": 1}'.encode("utf-16-le"), "perhaps UTF-16"),
        (b'["\\ud83d"]', "not text: half of a surrogate pair"),
        (b'["\\uDE00"]', "not text: half of a surrogate pair"),
        (b'{"a": 1, "b": 2, "a": 3}', 'found duplicate key "a"'),
        (b'{"\\ud83d": 1, "\\ud83d": 3}', "duplicate key"),
        (b'"a\0b"', "not JSON: Invalid control character"),
    ],
)
def test_json_of_others_that_is_none_gives_one_sentence(raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as raised:
        parse_json(raw)
    assert str(raised.value).isprintable()
    assert "sys." not in str(raised.value)


def test_json_lenient_takes_the_last_of_equal_keys() -> None:
    assert parse_json(b'{"a": 1, "a": 2, "b": "\\ud83d"}', unique_keys=False) == {"a": 2, "b": "\ud83d"}


def test_keys_are_shown_short_and_printable() -> None:
    assert shown_keys({"größe": 1, "a": 2}) == "['a', 'größe']"
    assert shown_keys({str(index): 0 for index in range(10)}).endswith("'7', and 2 more]")
