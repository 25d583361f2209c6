"""Every command of README, docs/ and the help texts: run as it stands where it can be, and parsed everywhere."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from keepwarm.tested import installed
from tests.support import commands
from tests.support.commands import PAGES, ROOT, Block

BLOCKS = [block for page in PAGES for block in commands.blocks(page)]
RUNNABLE = [page for page in PAGES if any(block.not_run is None for block in commands.blocks(page))]
WALKTHROUGH = ROOT / "docs/walkthrough.md"  # has a test of its own, which also looks at what comes out


@cache
def flags(*command: str) -> frozenset[str]:
    """Return the options that the help of a command lists."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "keepwarm", *command, "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert done.returncode == 0, f"keepwarm {' '.join(command)} --help\n{done.stderr}"
    return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout))


GROUPS = ("data", "checkpoint", "surgery", "site")
"""Commands that have commands of their own."""


def check_parsed(words: list[str]) -> None:
    """Assert that the command exists, and that its help lists every option that is given to it."""
    name = [word for word in words[1:3] if not word.startswith("-")][: 2 if words[1] in GROUPS else 1]
    known = flags(*name)
    options = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    # `--a.b=c` changes a value of the job.
    assert {option for option in options if "." not in option} <= known, " ".join(words)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_documented_commands_are_known_with_their_options(block: Block) -> None:
    for words in commands.commands(block.text):
        check_parsed(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_page_has_no_unmarked_command(page: Path) -> None:
    assert commands.unmarked(page) == []


@pytest.mark.parametrize("module", ["launch", "trainer"])
def test_help_examples_are_known_with_their_options(module: str) -> None:
    found = 0
    for file in sorted((ROOT / module).rglob("*.py")):
        for line in re.findall(r"^ {4,12}(keepwarm [a-z].*)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            for words in commands.commands(line):
                check_parsed(words)
                found += 1
    assert found > 5


def test_command_blocks_not_run_give_a_reason() -> None:
    for block in BLOCKS:
        assert block.not_run is None or len(block.not_run.split()) > 1, block.name


def required(name: str, extras: tuple[str, ...]) -> list[str]:
    """Return what a distribution requires; of keepwarm what the checkout says, not what was installed of it."""
    if canonicalize_name(name) == "keepwarm":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def allowed(extras: frozenset[str]) -> set[str]:
    """Return the distributions that `pip install 'keepwarm[extras]'` brings, by their canonical names."""
    found: set[str] = set()
    rest = [("keepwarm", tuple(sorted(extras)))]
    while rest:
        name, wanted = rest.pop()
        if (canonical := canonicalize_name(name)) in found and not wanted:
            continue
        found.add(canonical)
        for requirement in map(Requirement, required(name, wanted)):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                follow = tuple(sorted(requirement.extras))
                if canonicalize_name(requirement.name) not in found or follow:
                    rest.append((requirement.name, follow))
    return found


def link_environment(folder: Path, extras: frozenset[str]) -> None:
    """Link into `folder` what an installation with `extras` has, and nothing else of the running environment."""
    names = allowed(extras)
    for distribution in metadata.distributions(path=[sysconfig.get_path("purelib")]):
        if canonicalize_name(distribution.name) not in names:
            continue
        for file in distribution.files or []:
            top = file.parts[0]
            place = folder / top
            if top not in ("..", "__pycache__") and not top.endswith(".pth") and not place.exists():
                place.symlink_to(Path(str(distribution.locate_file(top))))


def shell(here: Path, extras: frozenset[str]) -> dict[str, str]:
    """Return the environment of a shell in which `keepwarm` and `python`, and what they start, have `extras` alone."""
    for extra in sorted(extras):
        for requirement in map(Requirement, required("keepwarm", (extra,))):
            if requirement.name != "keepwarm" and installed(requirement.name) is None:
                pytest.skip(f"{requirement.name} is not installed: pip install 'keepwarm[{extra}]'")
    home = here / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python3*/site-packages")
    link_environment(site, extras)
    command = home / "bin" / "keepwarm"
    command.write_text(f'#!/bin/sh\nexec "{home / "bin" / "python"}" -P -m keepwarm "$@"\n')
    command.chmod(0o755)
    (here / "home").mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL", "KEEPWARM"))}
    return kept | {
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}/src:{ROOT}",
        "HOME": str(here / "home"),
    }


def run_page(page: Path, here: Path, *, long: bool) -> None:
    environment = shell(here, commands.extras(page))
    (here / "configs").symlink_to(ROOT / "configs")
    for block in commands.blocks(page):
        if block.not_run is not None or (block.long and not long):
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            capture_output=True,
            text=True,
            cwd=here,
            env=environment,
            timeout=900,
        )
        assert done.returncode == 0, f"{block.name}\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", [page for page in RUNNABLE if page != WALKTHROUGH], ids=lambda page: page.name)
def test_documented_commands_run_with_the_installed_extras(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, long=False)


@pytest.mark.parametrize("extras", [frozenset(), frozenset({"megatron"})], ids=["base", "megatron"])
def test_page_environment_has_only_its_extras(extras: frozenset[str], tmp_path: Path) -> None:
    code = "import importlib.util as util; print(*(name for name in {!r} if util.find_spec(name)))"
    names = ("torch", "matplotlib", "keepwarm", "megatron", "transformers", "deepspeed", "pytest")
    command = ["python", "-c", code.format(names)]
    environment = shell(tmp_path, extras)
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["torch", "matplotlib", "keepwarm", *extras]


LONG = [page for page in RUNNABLE if page != WALKTHROUGH and any(block.long for block in commands.blocks(page))]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", LONG, ids=lambda page: page.name)
def test_documented_long_commands_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, long=True)
