"""Read JSON that others wrote: any text gives a value or one sentence about what is wrong with it."""

import json
import sys
from collections.abc import Mapping
from typing import Any

BOM = b"\xef\xbb\xbf"
# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_KEYS = 8


def parse_json(raw: bytes, *, unique_keys: bool = True, whole: bool = True) -> Any:
    """Return the value of a JSON text in UTF-8, with or without a byte-order mark.

    Args:
        unique_keys: refuse duplicate keys and lone surrogates, which no file that a program configures itself from
            may have; otherwise the last of equal keys counts, as in other readers.
        whole: `raw` is a whole file, which may begin with the mark of another encoding.

    Raises:
        ValueError: it is not JSON in UTF-8, is nested too deep, or has an integer of more digits than Python reads;
            one line, without the name of the file.
    """
    text = decode_utf8(raw, whole=whole)
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
        if unique_keys and "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        wide = "; it has NUL bytes: perhaps UTF-16, not UTF-8" if "\0" in text[:100] else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}{wide}") from None
    except UnicodeEncodeError:
        raise ValueError("not text: half of a surrogate pair stands alone") from None
    except DuplicateKey as error:
        raise ValueError(f'found duplicate key "{shown_name(error.args[0])}"') from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deep") from None
    except ValueError:
        digits = f"{sys.get_int_max_str_digits():,}"
        raise ValueError(f"not JSON that can be read: an integer of more than {digits} digits") from None
    return value


def decode_utf8(raw: bytes, *, whole: bool = True) -> str:
    """Return UTF-8 bytes as text, without a byte-order mark at the beginning.

    Raises:
        ValueError: it is not UTF-8; one line that names UTF-16 and UTF-32, which Windows programs write.
    """
    try:
        return raw.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        for mark, name in _OTHER_MARKS.items():
            if whole and raw.startswith(mark):
                raise ValueError(f"{name}, not UTF-8: convert it, as with `iconv -f {name} -t UTF-8`") from None
        found = f"byte 0x{raw[error.start]:02x} at position {error.start}" if error.start < len(raw) else error.reason
        raise ValueError(f"not UTF-8: {error.reason}: {found}") from None


def shown_name(name: str) -> str:
    """Return a name from a foreign text as it can stand in a message: short, with nothing that cannot be printed."""
    return repr(name if len(name) <= 60 else f"{name[:57]}...")[1:-1]


def shown_keys(table: Mapping[str, Any]) -> str:
    """Return the keys of a foreign object as they can stand in a message: the first few, sorted."""
    names = sorted(table)
    shown = [f"'{shown_name(name)}'" for name in names[:_KEYS]]
    more = [f"and {len(names) - _KEYS} more"] if len(names) > _KEYS else []
    return f"[{', '.join(shown + more)}]"


class DuplicateKey(ValueError):
    """An object has two equal keys; the argument is the key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DuplicateKey(name)
            seen.add(name)
    return found
