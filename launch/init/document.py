"""The text of a first job: its keys as YAML, each choice explained by a comment."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.yaml import parse_value

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*")
_UNPRINTED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def flow(value: object) -> str:
    """Return a value as YAML of one line: text as it is where it stays text, else in quotes."""
    match value:
        case Mapping():
            return "{" + ", ".join(f"{flow(key)}: {flow(inner)}" for key, inner in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(flow, value)) + "]"
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:_}" if value >= 10_000 else str(value)
        case float():
            return f"{value:g}" if value >= 1e-2 or value == 0 else f"{value:.3g}".replace("e-0", "e-")
    text = str(value)
    return text if _is_plain(text) else _UNPRINTED.sub(_escaped, json.dumps(text, ensure_ascii=False))


def lines(name: str, values: Mapping[str, object], indent: str = "  ") -> Iterator[str]:
    """Yield a mapping as YAML, one key on each line."""
    yield f"{indent}{name}:"
    for key, value in values.items():
        yield f"{indent}  {flow(key)}: {flow(value)}"


def comment(text: str, indent: str = "") -> Iterator[str]:
    """Yield a comment in lines of about 110 characters."""
    line = f"{indent}#"
    for word in text.split():
        if len(line) + 1 + len(word) > 110 and line.strip() != "#":
            yield line
            line = f"{indent}#"
        line += f" {word}"
    yield line


def path_in_job(path: str | Path, folder: Path) -> str:
    """Return how a job file in `folder` names a path: relative where it lies below, with nothing to be expanded."""
    absolute = str(Path(path).absolute())
    inside = os.path.relpath(absolute, folder)
    text = absolute if inside.startswith(("..", "~")) else inside
    return text.replace("$", "$$")


def _is_plain(text: str) -> bool:
    try:
        return bool(_PLAIN.fullmatch(text)) and parse_value(text, "text") == text
    except SpecError:
        return False


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
