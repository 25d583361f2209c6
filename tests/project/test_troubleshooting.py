"""Every message that docs/troubleshooting.md quotes is one of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)
PRODUCT = ("launch", "trainer", "parallel", "ft", "src/keepwarm")


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield every text of a module, with `…` for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.fixture(scope="module")
def messages() -> str:
    files = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    return "\0".join(text for path in files for text in texts(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_message_is_in_the_code(quoted: str, messages: str) -> None:
    assert quoted in messages


def test_every_heading_of_the_page_quotes_a_message_and_says_what_to_do() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) == len(QUOTED) > 25
    assert [one.splitlines()[0] for one in sections if len(one.partition("\n")[2].split()) < 15] == []


def test_message_that_the_code_has_not_is_found_out(messages: str) -> None:
    assert "the moon is full" not in messages
