"""Format, lint, types, import rules and dead code of all the code, as `make lint` checks them."""

import fnmatch
import re
import subprocess
import sys
import tomllib
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
