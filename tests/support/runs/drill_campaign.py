"""Drawn drills on real processes: one seed gives one run of four nodes through four faults.

    python -m tests.support.runs.drill_campaign --seeds 20-149 --results FILE

runs the seeds that FILE does not yet name as passed, and appends a line of JSON for each: what was drawn, how each
fault ended, how long it took, and what was wrong, if anything. The runs lie in a folder beside FILE, where those that
failed are kept.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepwarm.ft.discovery.registry import AGENTS_FOLDER
from keepwarm.launch.drill.campaign import WITH_FAULTS
from keepwarm.trainer.monitor import events

ROOT = Path(__file__).parents[3]
DEADLINE = 600.0
"""Of one of the two runs of a drill, in seconds."""
MARK = "KEEPWARM_TEST_DRILL"
"""Environment variable of everything that drills of tests start."""
FAULTS = 4
FOUR_NODES = "ci/drill"
TWELVE_STEPS = "stages.0.tokens=6_144"
ONE_RANK_A_NODE = ("parallel.tensor=1", "cluster.ranks_per_node=1")
FROM_MEMORY = (None, "local", "decoded")
"""Recovery levels of drawn faults, which never lose more memory at once than the code carries."""


def drill(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """What `keepwarm drill --json` prints."""
    command = [sys.executable, "-P", "-m", "keepwarm", "drill", *arguments, f"output={folder}", "--json"]
    environment = os.environ | {MARK: str(os.getpid())}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=5 * DEADLINE, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def campaign(folder: Path, seed: int, *overrides: str) -> dict[str, Any]:
    """Run the drill of a seed; return what `drill` returns.

    Raises:
        AssertionError: it ended otherwise than the undisturbed run, left processes behind, restored from disk, or lost
            a committed step. Others may be lost: there is no snapshot while an agent starts, and training goes on.
    """
    drawn = ("--random", str(FAULTS), "--seed", str(seed), "--timeout", str(DEADLINE))
    found = drill(folder, FOUR_NODES, TWELVE_STEPS, *overrides, *drawn)
    print(f"seed {seed}:", ", ".join(fault["fault"] for fault in found["faults"]), flush=True)
    assert found["bitwise_equal"], (seed, found)
    assert found["residue"] == []
    assert all(fault["level"] in FROM_MEMORY for fault in found["faults"]), found
    assert lost_commits(folder / WITH_FAULTS) == []
    return found


def lost_commits(run: Path) -> list[str]:
    """Return the starts of a run that went on from something older than what an agent had noted as committed."""
    commits = [
        (line["time"], (line["epoch"], line["step"]))
        for log in (run / AGENTS_FOLDER).glob("agent-*.log")
        for line in map(json.loads, log.read_text().splitlines())
        if line["text"] == "committed"
    ]
    lost = []
    for began in events.read(run).of(events.Began):
        _, step = max((age for time_, age in commits if time_ < began.time), default=(0, 0))
        if began.step < step:
            lost.append(f"step {began.step} from {began.source}, and step {step} was committed: {began.reason}")
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="20-149", metavar="FIRST-LAST")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--until", default="99:99", metavar="HH:MM", help="begin no seed after this time of the day")
    given = parser.parse_args()
    first, _, last = given.seeds.partition("-")
    done = {record["seed"] for record in _records(given.results) if record["wrong"] is None}
    root = given.results.with_suffix("")
    for seed in range(int(first), int(last or first) + 1):
        if seed not in done and time.strftime("%H:%M") < given.until:
            with given.results.open("a") as file:
                file.write(json.dumps(_one(root, seed)) + "\n")


def _records(file: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _one(root: Path, seed: int) -> dict[str, Any]:
    begin, wrong, kept, faults = time.monotonic(), None, None, []
    try:
        found = campaign(root / "drawn", seed, *ONE_RANK_A_NODE)
        faults = [f"{fault['fault']}: {fault['level']}, {fault['steps_lost']} lost" for fault in found["faults"]]
    except AssertionError as error:
        wrong, kept = str(error), root / f"kept{seed}"
        shutil.move(root / "drawn", kept)
    return {
        "seed": seed, "commit": _commit(), "faults": faults, "seconds": round(time.monotonic() - begin, 1),
        "kept": str(kept) if kept else None, "wrong": wrong,
    }  # fmt: skip


def _commit() -> str:
    shown = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
