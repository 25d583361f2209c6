"""Texts of messages."""

import pytest

from keepwarm.text import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bad lines"), (1, "1 bad line"), (2, "2 bad lines"), (2000, "2,000 bad lines")]
)
def test_counted_is_plural_unless_there_is_one(number: int, text: str) -> None:
    assert counted(number, "bad line") == text
