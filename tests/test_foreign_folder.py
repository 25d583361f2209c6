"""Every documented start runs keepwarm in the folder of another project that has packages of the same names as ours."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepwarm.trainer.job.run_folder import RunFolder

NAMES = ("trainer", "launch", "ft", "parallel", "tests", "configs", "docs", "src")
FOREIGN = """
import pathlib
(pathlib.Path(__file__).parents[1] / "foreign-code-ran").touch()
raise SystemExit(0)
"""
BIN = Path(sys.executable).parent
SMALL = ("stages.0.tokens=1_024", "evaluation.samples=1", "log.tensorboard=false")
STEPS = 2


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """Another project's folder, in which nothing but keepwarm may run."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        for file in ("__init__.py", "__main__.py"):
            (tmp_path / name / file).write_text(FOREIGN)
    # A clone of keepwarm beside the other folders: a folder of its name that is no package.
    for name in ("keepwarm/trainer", "keepwarm/launch/node", "keepwarm/src"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("__init__.py", "__main__.py"):
            (tmp_path / name / file).write_text(FOREIGN.replace("parents[1]", f"parents[{name.count('/') + 1}]"))
    yield tmp_path
    assert not (tmp_path / "foreign-code-ran").exists()


def start(project: Path, *command: str, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= variables
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def prepared(project: Path) -> str:
    """A run folder with a run.json, as launchers other than ours start from."""
    start(project, str(BIN / "keepwarm"), "train", "configs/ci/tiny.yaml", "output=run", *SMALL)
    for path in (RunFolder(project / "run").metrics_file, RunFolder(project / "run").events_file):
        path.unlink()
    return "run/run.json"


STARTS: dict[str, Callable[[Path], list[str]]] = {
    "keepwarm train": lambda project: [str(BIN / "keepwarm"), "train", "ci/tiny", "output=run", *SMALL],
    "python -m keepwarm": lambda project: [
        *(sys.executable, "-m", "keepwarm", "train", "configs/ci/tiny.yaml", "output=run", *SMALL)
    ],
    "python -m keepwarm.trainer": lambda project: [sys.executable, "-m", "keepwarm.trainer", prepared(project)],
    "torchrun": lambda project: [
        *(str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "1", "-m", "keepwarm.trainer", prepared(project))
    ],
    "python -m keepwarm.launch.node": lambda project: [
        *(sys.executable, "-m", "keepwarm.launch.node", prepared(project).removesuffix("/run.json"), "--slots", "1")
    ],
}


@pytest.mark.parametrize("name", STARTS)
def test_start_in_foreign_folder_trains_with_keepwarm(name: str, project: Path) -> None:
    start(project, *STARTS[name](project))
    lines = [json.loads(line) for line in RunFolder(project / "run").metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


def test_train_with_the_foreign_folder_on_the_python_path_runs_keepwarm(project: Path) -> None:
    start(project, *STARTS["keepwarm train"](project), PYTHONPATH=str(project))
    assert len(RunFolder(project / "run").metrics()) >= STEPS


def test_start_safe_path_ignores_a_foreign_package_of_the_same_name(project: Path) -> None:
    (project / "keepwarm" / "__init__.py").write_text(FOREIGN)
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "1", "-m", "keepwarm.trainer"]
    start(project, *command, prepared(project), PYTHONSAFEPATH="1")
    start(project, sys.executable, "-P", "-m", "keepwarm", "plan", "ci/tiny")


def test_plan_in_foreign_folder_is_keepwarms(project: Path) -> None:
    assert "= 1 rank on 1 node" in start(project, str(BIN / "keepwarm"), "plan", "configs/ci/tiny.yaml")


@pytest.mark.parametrize("name", ["trainer", "launch", "ft", "parallel"])
def test_installation_offers_no_top_level_package_of_a_common_name(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=60).returncode == 0
