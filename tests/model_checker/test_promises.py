"""`docs/promises.md` names tests that exist, and every promise of the model checker."""

import re
from pathlib import Path

from tests.model_checker.truth import PROMISES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/promises.md").read_text(encoding="utf-8")


def test_page_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named
    assert named - defined == set()


def test_every_line_that_is_held_names_a_test() -> None:
    held = PAGE.partition("## Not yet held")[0]
    lines = re.split(r"^\d+\. ", held, flags=re.MULTILINE)[1:]
    assert lines
    assert [line for line in lines if "`test_" not in line] == []


def test_page_has_every_promise_of_the_model_checker() -> None:
    assert set(re.findall(r"\bI\d\b", PAGE)) == set(PROMISES)
