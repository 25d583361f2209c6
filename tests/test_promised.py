"""In CI a test that skips for want of a promised extra fails; on a user's machine it skips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.promised import promised

ROOT = Path(__file__).parents[1]
SKIPPING = """
import pytest

@pytest.mark.skipif(True, reason="not installed: pip install 'keepwarm[{extra}]'")
def test_marked():
    pass

def test_called():
    pytest.importorskip("no_such_module", reason="pip install 'keepwarm[{extra}]'")
"""


def test_promised_extra_holds_what_it_includes() -> None:
    assert promised("test") == {"test"}
    assert {"dev", "test", "megatron", "deepspeed", "hf"} <= promised("dev")
    assert not {"eval", "s3", "wandb"} & promised("dev")
    assert promised("dev") < promised("long")


@pytest.mark.parametrize(
    ("ci", "extras", "extra", "outcome"),
    [
        ("true", "dev", "megatron", "1 failed, 1 error"),
        ("true", "test", "megatron", "2 skipped"),
        ("true", "dev", "eval", "2 skipped"),
        ("true", "long", "eval", "1 failed, 1 error"),
        ("", "dev", "megatron", "2 skipped"),
    ],
)
def test_skip_for_a_promised_extra_fails_in_ci(ci: str, extras: str, extra: str, outcome: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_skipping.py").write_text(SKIPPING.format(extra=extra))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            "-q",
            "--extras",
            extras,
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env=os.environ | {"CI": ci, "PYTHONPATH": f"{ROOT}/src:{ROOT}"},
    )
    assert done.stdout.strip().splitlines()[-1].startswith(outcome), done.stdout + done.stderr
