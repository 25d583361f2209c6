"""docs/science.md lists every test of tests/science with its experiment, and none besides."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def defined() -> list[str]:
    """Return `file::function` or `file::class::function` of every test in tests/science."""
    found = []
    for path in sorted((ROOT / "tests" / "science").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            group, inside = (f"{node.name}::", node.body) if isinstance(node, ast.ClassDef) else ("", [node])
            functions = [one.name for one in inside if isinstance(one, ast.FunctionDef)]
            found += [f"{path.name}::{group}{name}" for name in functions if name.startswith("test_")]
    return found


def listed() -> list[tuple[str, str]]:
    """Return experiment and test of every row of the page."""
    text = (ROOT / "docs" / "science.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (A\d+) \|.*\| `(test_[\w.:]+)` \|", text, re.MULTILINE)


def test_science_page_lists_every_test_once() -> None:
    assert sorted(test for _, test in listed()) == sorted(defined())


def test_science_test_names_carry_their_experiment() -> None:
    assert [row for row in listed() if not row[1].rpartition("::")[2].startswith(f"test_{row[0].lower()}_")] == []
