"""The versions that are said to be tested, and what pyproject.toml lets in."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from keepwarm.tested import TESTED, Range, installed, splits_custom_backward

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("2.11.0", True),
        ("2.13.0+cpu", True),
        ("2.13.9", True),
        ("2.10.1", False),
        ("2.14.0", False),
        ("2.12.0rc1", False),
        ("2.12.0.dev20260101", False),
        ("3.0", False),
        ("unknown", False),
    ],
)
def test_range_of_minor_releases_holds_their_patches(version: str, inside: bool) -> None:
    assert (version in Range("2.11", "2.13")) is inside


@pytest.mark.parametrize(
    ("version", "inside"), [("0.16.1", True), ("0.16.1+local", True), ("0.16.2", False), ("0.16.1.post1", True)]
)
def test_range_of_one_release_holds_only_it(version: str, inside: bool) -> None:
    assert (version in Range("0.16.1", "0.16.1")) is inside


@pytest.mark.parametrize(
    ("torch", "splits"), [("2.11.0", False), ("2.12.1+cu130", False), ("2.13.0+cpu", True), ("2.14.1", True)]
)
def test_zero_bubble_needs_torch_2_13(torch: str, splits: bool) -> None:
    assert splits_custom_backward(torch) is splits


@pytest.mark.parametrize("distribution", TESTED)
def test_tested_bounds_may_be_installed(distribution: str) -> None:
    """What pyproject.toml refuses cannot have been tested."""
    tested = TESTED[distribution]
    if distribution == "python":
        allowed = SpecifierSet(PROJECT["requires-python"])
    else:
        named = [
            *PROJECT["dependencies"],
            *(one for extra in PROJECT["optional-dependencies"].values() for one in extra),
        ]
        (allowed,) = {one.specifier for one in map(Requirement, named) if one.name == distribution}
    for bound in (tested.lowest, tested.highest):
        assert bound in allowed


def test_classifiers_name_the_tested_interpreters() -> None:
    prefix = "Programming Language :: Python :: 3."
    minors = [int(one.removeprefix(prefix)) for one in PROJECT["classifiers"] if one.startswith(prefix)]
    low, high = (int(bound.split(".")[1]) for bound in (TESTED["python"].lowest, TESTED["python"].highest))
    assert minors == list(range(low, high + 1))


def test_installed_versions_are_within_the_tested_ranges() -> None:
    found = {distribution: installed(distribution) for distribution in TESTED}
    assert None not in (found["python"], found["torch"], found["pyeclib"])
    assert {name: one for name, one in found.items() if one is not None and one not in TESTED[name]} == {}
