"""Text from outside that is not UTF-8: Python keeps such bytes as lone surrogates, which nothing can write again.

Paths from outside that the system refuses to look up. Counts of things.
"""

import errno
import os
from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1: `1 bad line`, `2,000 bad lines`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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


_LOOK_UP = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ESTALE)


def problem_of_path(error: OSError) -> str | None:
    """Return which path the system refused to look up, and why; None for any other error."""
    if error.filename is None or error.errno not in _LOOK_UP:
        return None
    path = shown(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else str(error.filename)
    return f"{path if len(path) <= 300 else f'{path[:200]}... ({len(path)} characters)'}: {error.strerror}"
