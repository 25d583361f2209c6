"""docs/walkthrough.md, every command as it stands: Hugging Face in, two stages with replay, out, scores, text."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keepwarm.ft.format import publication

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/walkthrough.md"

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'keepwarm[eval]'"
    ),
    pytest.mark.long,
    pytest.mark.timeout(1500),
]


def commands() -> list[str]:
    """The blocks of the page, in order."""
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `walk` after all commands."""
    here = tmp_path_factory.mktemp("checkout")
    (here / "configs").symlink_to(ROOT / "configs")
    (here / "bin").mkdir()
    python = shlex.quote(sys.executable)
    for name, command in (("keepwarm", f"{python} -P -m keepwarm"), ("python", python)):
        (here / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (here / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{here / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "HF_DATASETS_CACHE": str(here / "datasets"),
    }
    blocks = commands()
    assert len(blocks) == 6
    for block in blocks:
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            capture_output=True,
            text=True,
            cwd=here,
            env=environment,
            timeout=900,
        )
        assert ran.returncode == 0, f"{block}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return here / "walk"


def scores(walked: Path, of: str) -> dict[str, Any]:
    return dict(json.loads((walked / f"{of}.scores.json").read_text())["tasks"])


def test_walkthrough_both_stages_train_with_replay(walked: Path) -> None:
    newest = publication.latest(walked / "run/checkpoints")
    assert newest is not None
    ledger = publication.verify(newest).meta["ledger"]
    assert ledger["replayed"] == {"english": 96, "german": 240}


def test_walkthrough_export_scores_better_than_base(walked: Path) -> None:
    base, export = scores(walked, "base"), scores(walked, "export")
    for text in ("en", "de"):
        assert export[text]["bits_per_byte"] < 0.8 * base[text]["bits_per_byte"]


def test_walkthrough_run_and_export_score_the_same(walked: Path) -> None:
    (file,) = (walked / "harness").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["words"]["acc,none"]
    assert scores(walked, "run")["words"]["acc"] == theirs


def test_walkthrough_transformers_generates_the_same_text(walked: Path) -> None:
    ours = json.loads((walked / "sample.json").read_text())["samples"][0]["tokens"]
    assert json.loads((walked / "generated.json").read_text())[: len(ours)] == ours
    assert len(ours) > 3
