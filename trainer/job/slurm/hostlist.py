"""Lists of nodes in SLURM's syntax, such as `gpu[01-03,7],rack[1-2]n[0-3]`. Torch-free and pure."""

import itertools
import re
from collections.abc import Iterable

MAX_NODES = 65_536
_PIECE = re.compile(r"\[([^\]]*)\]")


def expand(hosts: Iterable[str]) -> list[str]:
    """Return the names of the nodes in order, each once.

    Raises ValueError, naming the part, for a range that SLURM would not take, or more than `MAX_NODES`.
    """
    found: dict[str, None] = {}
    for text in hosts:
        for word in re.split(r",(?![^\[]*\])", text):
            for name in _expand(word) if word else ():
                found[name] = None
                if len(found) > MAX_NODES:
                    raise ValueError(f"{text}: more than {MAX_NODES} nodes")
    return list(found)


def _expand(word: str) -> Iterable[str]:
    """Yield the names in a word; the last pair of brackets varies fastest."""
    fixed = _PIECE.split(word)
    parts = [[each] if number % 2 == 0 else _numbers(each, word) for number, each in enumerate(fixed)]
    return map("".join, itertools.product(*parts))


def _numbers(ranges: str, word: str) -> list[str]:
    found: list[str] = []
    for each in ranges.split(","):
        first, dash, last = each.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) <= 9 for end in ends) or int(ends[0]) > int(ends[1]):
            raise ValueError(f"{word}: expected ranges of numbers such as [1-3,7]; got [{ranges}]")
        if int(ends[1]) - int(ends[0]) >= MAX_NODES:
            raise ValueError(f"{word}: more than {MAX_NODES} nodes")
        found += [f"{number:0{len(first)}d}" for number in range(int(ends[0]), int(ends[1]) + 1)]
    return found
