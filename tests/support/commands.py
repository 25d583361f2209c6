"""The commands of the documentation: where they stand, what they need, and whether they can be run by a test.

Commands stand in fenced blocks of the languages `console` (lines that begin with `$ ` are commands, the others what
they print) and `sh` (all lines). A page says once, as a line of its own, which extras it needs: "Needs: pip install
'keepwarm[hf]'". A block that no test can run has a comment above it, which stays invisible where the page is read:
`<!-- not run: REASON -->`; its commands are still parsed. `<!-- long -->` is for blocks that take minutes.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^>]*) -->\n\n?)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_NEEDS = re.compile(r"^Needs: pip install '(keepwarm(?:\[[\w,]+\])?)'", re.MULTILINE)
_STARTS = ("keepwarm ", "torchrun ", "mpirun ", "srun ", "python ", "make ")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of commands."""

    page: Path
    line: int
    text: str
    """A shell script."""
    not_run: str | None
    """Why no test runs it."""
    long: bool

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of commands of a page in order."""
    content = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(content):
        if found["language"] not in ("console", "sh"):
            continue
        note = found["note"] or ""
        yield Block(
            page=page,
            line=content.count("\n", 0, found.start("text")) + 1,
            text=_script(found["text"]) if found["language"] == "console" else found["text"],
            not_run=note.removeprefix("not run: ") if note.startswith("not run: ") else None,
            long=note == "long",
        )


def unmarked(page: Path) -> list[str]:
    """Return the lines that look like commands and stand in no block of commands, nor in a line of prose."""
    content = page.read_text(encoding="utf-8")
    kept = _BLOCK.sub(lambda found: "" if found["language"] in ("console", "sh") else found["text"], content)
    return [line for line in kept.splitlines() if line.removeprefix("    ").removeprefix("$ ").startswith(_STARTS)]


def extras(page: Path) -> frozenset[str]:
    """Return the extras that a page says it needs."""
    found = _NEEDS.search(page.read_text(encoding="utf-8"))
    _, _, names = (found[1] if found else "").partition("[")
    return frozenset(name for name in names.rstrip("]").split(",") if name)


def commands(script: str) -> Iterator[list[str]]:
    """Yield every start of `keepwarm` in a script as its words, without what follows a pipe, redirection or `&`."""
    without_documents = re.sub(r"<<-?\s*'?(\w+)'?.*?^\1$", "", script, flags=re.MULTILINE | re.DOTALL)
    for line in without_documents.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word in (";", "|", "&", "&&", ">", ">>", "do", "done"):
                if words[:1] == ["keepwarm"]:
                    yield words
                words = []
            else:
                words.append(word)


def _script(console: str) -> str:
    """Return the commands of a console: lines after `$ `, with those that continue them."""
    lines: list[str] = []
    inside = False
    for line in console.splitlines():
        if line.startswith("$ ") or inside:
            lines.append(line.removeprefix("$ "))
            inside = line.endswith("\\")
    return "\n".join(lines) + "\n"
