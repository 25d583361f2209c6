"""`protocol.pml` and `ballot.pml`, checked exhaustively by spin: every order of events of a few small jobs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("protocol.pml")
BALLOT = MODEL.with_name("ballot.pml")
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
ELECTION = {"EPOCHS": 1, "FRESH": 0}
ELECTIONS = {
    "2 slots": ELECTION | {"NODES": 2, "LEFT_OUT": 1, "LOSSES": 2},
    "2 slots, new": ELECTION | {"NODES": 2, "LEFT_OUT": 1, "LOSSES": 2, "FRESH": 1},
    "2 slots, 2 epochs": ELECTION | {"NODES": 2, "LEFT_OUT": 2, "LOSSES": 2, "EPOCHS": 2},
    "3 slots": ELECTION | {"NODES": 3, "LEFT_OUT": 3, "LOSSES": 2},
    "4 slots": ELECTION | {"NODES": 4, "LEFT_OUT": 4, "LOSSES": 2},
}
ELECTION_RULES = {
    1: ("votes of new agents are not enough", ELECTION | {"NODES": 3, "LEFT_OUT": 3, "LOSSES": 1}),
    2: ("a new agent is named itself", ELECTION | {"NODES": 4, "LEFT_OUT": 4, "LOSSES": 2}),
    3: ("no agent that is replaced is named", ELECTION | {"NODES": 3, "LEFT_OUT": 3, "LOSSES": 1, "EPOCHS": 2}),
}
pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="needs spin and gcc: apt-get install spin gcc",
)


def checked(folder: Path, job: dict[str, int], rule: int = 0, model: Path = MODEL) -> str:
    """Return what the verifier says of the job with a rule left out (0: none)."""
    defines = [f"-D{name}={value}" for name, value in (job | {"BREAK": rule}).items()]
    subprocess.run(["spin", *defines, "-a", str(model)], cwd=folder, check=True, timeout=60)
    compile_ = ["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=2048", "-o", "pan", "pan.c"]
    subprocess.run(compile_, cwd=folder, check=True, timeout=120)
    run = subprocess.run(["./pan", "-m200000", "-n"], cwd=folder, capture_output=True, text=True, timeout=240)
    return run.stdout + run.stderr


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_order_of_events_keeps_the_promises(tmp_path: Path, job: dict[str, int]) -> None:
    exhausted(checked(tmp_path, job))


def exhausted(said: str) -> None:
    """Check that the verifier has been everywhere and found nothing."""
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


def marks_of(job: dict[str, int]) -> tuple[pytest.MarkDecorator, ...]:
    """Four slots have millions of states."""
    return (pytest.mark.long,) if job["NODES"] > 3 else ()


@pytest.mark.parametrize("job", [pytest.param(job, id=name, marks=marks_of(job)) for name, job in ELECTIONS.items()])
def test_agents_in_every_order_of_votes_and_losses_follow_one_choice_of_an_epoch(
    tmp_path: Path, job: dict[str, int]
) -> None:
    exhausted(checked(tmp_path, job, model=BALLOT))


@pytest.mark.parametrize(
    ("rule", "job"),
    [pytest.param(rule, job, id=name, marks=marks_of(job)) for rule, (name, job) in ELECTION_RULES.items()],
)
def test_rule_of_votes_left_out_makes_two_choices_of_one_epoch(tmp_path: Path, rule: int, job: dict[str, int]) -> None:
    assert re.search(r"errors: [1-9]", checked(tmp_path, job, rule, BALLOT))
