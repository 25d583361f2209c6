"""`protocol.pml`, checked exhaustively by spin: every order of events of a few small jobs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("protocol.pml")
SMALL = {"NODES": 2, "GROUPS": 1, "SNAPS": 3, "CRASHES": 2, "RANKS": 1}
JOBS = {
    "(1,1)": SMALL,
    "(2,1)": SMALL | {"NODES": 3, "CRASHES": 1},
    "two groups of (1,1)": SMALL | {"NODES": 4, "GROUPS": 2, "SNAPS": 2, "CRASHES": 1},
}
RULES = {
    1: "a choice frees nothing",
    2: "a commit needs all",
    3: "who passes says so",
    4: "stored means parity too",
    5: "the newest that decodes is chosen",
    6: "what was restored stays beside a newer choice",
}
pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="needs spin and gcc: apt-get install spin gcc",
)


def checked(folder: Path, job: dict[str, int], rule: int = 0) -> str:
    """Return what the verifier says of the job with a rule left out (0: none)."""
    defines = [f"-D{name}={value}" for name, value in (job | {"BREAK": rule}).items()]
    subprocess.run(["spin", *defines, "-a", str(MODEL)], cwd=folder, check=True, timeout=60)
    compile_ = ["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=2048", "-o", "pan", "pan.c"]
    subprocess.run(compile_, cwd=folder, check=True, timeout=120)
    run = subprocess.run(["./pan", "-m200000", "-n"], cwd=folder, capture_output=True, text=True, timeout=240)
    return run.stdout + run.stderr


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_order_of_events_keeps_the_promises(tmp_path: Path, job: dict[str, int]) -> None:
    said = checked(tmp_path, job)
    print(said)
    assert "errors: 0" in said, said
    assert "truncated" not in said, said
    assert "error: max search depth too small" not in said, said
    assert "Search not completed" not in said, said
    states = re.search(r"^ *(\d[\d.e+]*) states, stored", said, re.MULTILINE)
    assert states is not None, said
    assert float(states[1]) > 1000


@pytest.mark.parametrize("rule", RULES, ids=RULES.values())
def test_rule_left_out_breaks_a_promise(tmp_path: Path, rule: int) -> None:
    said = [checked(tmp_path, job, rule) for job in JOBS.values()]
    assert any(re.search(r"errors: [1-9]", each) for each in said), "\n".join(said)
