"""The documentation as a site, and the pages of it that follow from the code."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.project import reference_pages

ROOT = Path(__file__).parents[2]
MADE = {reference_pages.KEYS: reference_pages.job_keys, reference_pages.COMMANDS: reference_pages.commands}


@pytest.mark.parametrize("page", MADE, ids=lambda page: page.name)
def test_page_made_from_the_code_is_up_to_date(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == MADE[page](), "run `make reference`"


def test_reference_pages_have_every_section_and_command() -> None:
    keys, commands = (page.read_text(encoding="utf-8") for page in MADE)
    for heading in ("stages.lr (infinite)", "parallel.options (megatron)", "cluster.slurm.mail", "snapshot.code"):
        assert f"\n## {heading}\n" in keys
    for name in ("plan", "init", "data tokenize", "checkpoint verify", "drill", "simulate", "surgery widen", "submit"):
        assert f"\n## keepwarm {name}\n" in commands
    assert "| `global_batch_size` | whole number | required |" in keys
    assert "| `warmup` | number | `0.01` | fraction of steps spent on linear warm-up from zero |" in keys


class Images(HTMLParser):
    """Hosts that a page loads something from."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        loads = named.get("href") if tag == "link" and named.get("rel") == "stylesheet" else named.get("src")
        self.hosts |= set(re.findall(r"^(?:https?:)?//([^/]+)", loads or ""))


@pytest.mark.skipif(
    find_spec("material") is None or find_spec("mkdocstrings") is None,
    reason="mkdocs-material is not installed: pip install 'keepwarm[docs]'",
)
def test_site_is_built_strictly_with_every_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {path.parent.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("index.html")}
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index"} <= built
    home = Images()
    home.feed((tmp_path / "site/index.html").read_text(encoding="utf-8"))
    assert home.hosts == set()
    objects = (tmp_path / "site/api-objects/index.html").read_text(encoding="utf-8")
    assert "keepwarm.parallel.shard.Shard" in objects
    assert "::: keepwarm" not in objects
