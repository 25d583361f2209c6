"""Text from outside that is not UTF-8: Python keeps such bytes as lone surrogates, which nothing can write again."""

import os
from collections.abc import Sequence


def is_utf8(text: str) -> bool:
    """Return whether the text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """Return the text with what is not UTF-8 as `\\xNN` or `\\udNNN`."""
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def problem_of(arguments: Sequence[str]) -> str | None:
    """Return why arguments of a command cannot be used; None if they are UTF-8."""
    wrong = next((text for text in arguments if not is_utf8(text)), None)
    return (
        None if wrong is None else f"{shown(wrong)}: this argument is not UTF-8; write it, or name the file, in UTF-8"
    )
