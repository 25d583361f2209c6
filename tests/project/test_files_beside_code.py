"""Files beside the code that name versions or commands of it."""

import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from keepwarm.launch.cli.main import app

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
YAMLS = sorted(ROOT.glob(".github/**/*.yml"))


def test_citation_names_this_version_and_licence() -> None:
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_github_file_is_yaml_and_its_fields_have_names_of_their_own(path: Path) -> None:
    content = YAML(typ="safe").load(path)
    fields = [each["id"] for each in content.get("body", ())]
    assert len(fields) == len(set(fields))


def test_bug_form_asks_for_commands_that_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    asked = {part.split()[0].strip("`") for part in text.split("`keepwarm ")[1:]}
    assert asked
    assert asked <= set(commands)


@pytest.mark.parametrize("path", sorted(ROOT.glob("docker/*.Dockerfile")), ids=lambda path: path.stem)
def test_dockerfile_installs_extras_that_exist_within_the_constraints(path: Path) -> None:
    text = path.read_text()
    assert "--constraint constraints.txt" in text
    extras = text.partition("'.[")[2].partition("]")[0]
    assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"])
    assert "USER 1000" in text
