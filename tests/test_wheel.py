"""The source archive and the wheel made from it: built, installed away from the checkout, planned with."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"keepwarm"}


def built(out: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is made from the source archive, as pip does where it has no wheel."""
    return built(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment with the wheel in it.

    Its dependencies are linked from the running environment, package by package, without what keepwarm itself put
    there: the test needs no network, and what is tested comes out of the wheel. A link under one of our names would
    let pip write through it into the running environment.
    """
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    (target,) = home.glob("lib/python3*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name not in OURS and "keepwarm" not in entry.name and entry.suffix != ".pth":
            (target / entry.name).symlink_to(entry)
    install = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*install, "--no-index", "--quiet", str(wheel)], check=True, timeout=120)
    return home / "bin"


def run(environment: Path, cwd: Path, *command: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [str(environment / command[0]), *command[1:]], cwd=cwd, env=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_four_packages_and_the_configs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == OURS
    for path in ("ci/tiny.yaml", "models/tiny.yaml", "corpora/handbook_en.jsonl.zst", "corpora/LICENSE.md"):
        assert f"keepwarm/configs/{path}" in names
    for marker in ("py.typed", "__init__.pyi"):
        assert f"keepwarm/{marker}" in names


def test_wheel_of_the_source_archive_holds_what_that_of_the_checkout_does(wheel: Path, tmp_path: Path) -> None:
    ours = built(tmp_path, "--wheel")
    assert zipfile.ZipFile(wheel).namelist() == zipfile.ZipFile(ours).namelist()


def test_wheel_plans_from_an_empty_environment(environment: Path, tmp_path: Path) -> None:
    where = run(environment, tmp_path, "python", "-P", "-c", "import keepwarm; print(keepwarm.__file__)")
    assert str(environment.parent) in where
    plan = run(environment, tmp_path, "keepwarm", "plan", "configs/ci/tiny.yaml", "--spec")
    assert "= 1 rank on 1 node" in plan
    assert str(environment.parent) in plan, "the corpus must be the wheel's own"
    assert "keepwarm init" in run(environment, tmp_path, "keepwarm", "init", "--help")
