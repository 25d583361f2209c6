"""docs/reference.md lists every exit code, event and environment variable, and none besides."""

import inspect
import re
from pathlib import Path

from keepwarm.exit_code import ExitCode
from keepwarm.trainer.monitor.events import KINDS, LEVELS

ROOT = Path(__file__).parents[1]
PRODUCT = ("keepwarm", "launch", "trainer", "parallel", "ft")


def rows(section: str) -> list[list[str]]:
    """The cells of the rows of a section's first table, without its head."""
    text = (ROOT / "docs" / "reference.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    table = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_reference_exit_codes_are_those_of_the_enum() -> None:
    assert [(int(code), name.strip("`")) for code, name, _ in rows("Exit codes")] == [
        (int(code), code.name) for code in ExitCode
    ]


def test_reference_events_are_those_of_the_structs() -> None:
    expected = []
    for name, kind in KINDS.items():
        fields = ", ".join(f"`{field}`" for field in kind.__struct_fields__ if field != "time")
        expected.append([f"`{name}`", fields, " ".join((inspect.getdoc(kind) or "").split())])
    assert rows("Events") == expected


def test_reference_levels_are_those_of_recoveries() -> None:
    text = (ROOT / "docs" / "reference.md").read_text().partition("The levels of recovery")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == LEVELS


def test_reference_variables_are_those_in_the_code() -> None:
    files = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sbatch")]
    used = {name for path in files for name in re.findall(r"\bKEEPWARM_[A-Z_]+\b", path.read_text())}
    assert len(used) >= 8
    assert sorted(row[0].strip("`") for row in rows("Environment variables")) == sorted(used)
