"""Extras that the environment of a test run promises: in CI, a test that skips for want of one of them fails."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def promised(extra: str) -> frozenset[str]:
    """Return an extra of pyproject.toml and all that it includes."""
    extras: dict[str, list[str]] = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    found: set[str] = set()
    rest = [extra]
    while rest:
        name = rest.pop()
        found.add(name)
        for line in extras[name]:
            rest += [one for one in _named(line) if one not in found]
    return frozenset(found)


def broken_promise(reason: str, extras: frozenset[str]) -> str | None:
    """Return why a skip is a failure where `extras` are promised; None where it is not.

    A reason names what it lacks as its message would: `pip install 'keepwarm[EXTRA]'`.
    """
    lacking = sorted({*_named(reason)} & extras)
    if not lacking:
        return None
    return f"skipped, although this environment promises {', '.join(lacking)}: {reason}"


def _named(text: str) -> list[str]:
    return [name for group in re.findall(r"keepwarm\[([\w,]+)\]", text) for name in group.split(",")]
