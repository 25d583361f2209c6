"""Format, lint, types, import rules and dead code of all the code, as `make lint` checks them."""

import fnmatch
import io
import itertools
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = {
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "ruff check": ["-m", "ruff", "check", "."],
    "import-linter": ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    "mypy": ["-m", "mypy"],
    "vulture": ["-m", "vulture"],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", TOOLS)
def test_lint_tool_passes(tool: str) -> None:
    command = [sys.executable, *TOOLS[tool]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{tool}:\n{done.stdout}{done.stderr}"


def test_vulture_every_exception_is_needed() -> None:
    """What code needs no more, or what is called by now, has no place in the list of exceptions."""
    exceptions = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["vulture"]["ignore_names"]
    command = [sys.executable, "-m", "vulture", "--ignore-names", "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = re.findall(r"unused \w+ '(\w+)'", done.stdout)
    assert [name for name in exceptions if not fnmatch.filter(found, name)] == []


# ---- messages in several literals


LITERAL_STARTS = {tokenize.STRING, getattr(tokenize, "FSTRING_START", tokenize.STRING)}
LITERAL_ENDS = {tokenize.STRING, getattr(tokenize, "FSTRING_END", tokenize.STRING)}
BETWEEN = {tokenize.NL, tokenize.COMMENT}
LAST = re.compile(r"""(?<!\\)[\w.,;:!?)\]}]("{3}|'{3}|"|')$""")
FIRST = re.compile(r"""[A-Za-z]*("{3}|'{3}|"|')[\w(\[{]""")


def joined_without_space(source: str) -> Iterator[int]:
    """The lines of string literals that continue the one before them without a space between two words."""
    lines = source.splitlines()
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(source).readline) if one.type not in BETWEEN]
    for first, second in itertools.pairwise(tokens):
        if first.type in LITERAL_ENDS and second.type in LITERAL_STARTS:
            end, start = lines[first.end[0] - 1][: first.end[1]], lines[second.start[0] - 1][second.start[1] :]
            if LAST.search(end) and FIRST.match(start):
                yield second.start[0]


def test_joined_without_space_finds_what_lost_its_space() -> None:
    lost = ['("one"\n"two")', '(f"{one}"\nf"{two}")', "('one,' 'two')", '("one."\n# why\n\nf"Two {three}")']
    assert [len([*joined_without_space(text)]) for text in lost] == [1] * len(lost)
    kept = [
        '("one "\n"two")',
        '("one" " two")',
        r'("one\n" "two")',
        '("one/" f"{two}")',
        '("one", "two")',
        '("a" ".json")',
    ]
    assert [text for text in kept if [*joined_without_space(text)]] == []


def test_messages_in_several_literals_keep_their_spaces() -> None:
    files = [
        path
        for folder in ("src/keepwarm", "launch", "trainer", "parallel", "ft")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in files for line in joined_without_space(path.read_text("utf-8"))
    ]
    assert found == []
