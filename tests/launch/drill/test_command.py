"""keepwarm drill as people meet it when they are mistaken: one sentence, exit code 2, nothing started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from keepwarm.launch.drill.command import main
from keepwarm.launch.errors import DrillError
from keepwarm.trainer.errors import SpecError

SIGNALLED_AS_IT_STARTS = """
import os, subprocess, sys
class Popen(subprocess.Popen):
    def _execute_child(self, *arguments):
        super()._execute_child(*arguments)
        os.kill(os.getpid(), {number})
subprocess.Popen = Popen
sys.argv[0:1] = ["keepwarm", "drill"]
from keepwarm.launch.cli.main import main
main()
"""
ROOT = Path(__file__).parents[3]
DRILL = str(ROOT / "configs" / "ci" / "drill.yaml")
TINY = str(ROOT / "configs" / "ci" / "tiny.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([DRILL], "a drill needs a fault"),
        ([DRILL, "--kill", "worker:1@24"], "--kill worker:1@24: that step never comes"),
        ([DRILL, "--kill", "node:4@3"], "there is no node 4, the job has nodes 0 to 3"),
        ([DRILL, "--kill", "worker:8@3"], "there is no rank 8"),
        ([DRILL, "--kill", "wroker:1@3"], "cannot kill a 'wroker'"),
        ([DRILL, "--corrupt", "chunk1@3"], "expected TARGET@STEP, as --corrupt chunk:1@60"),
        ([TINY, "--kill", "worker:0@3"], "the job has snapshot: off"),
        ([TINY, "snapshot={every: 1}", "--kill", "node:0@3"], "set cluster.ranks_per_node"),
        ([TINY, "snapshot={every: 1}", "--stop", "disk@3"], "set snapshot.durable"),
    ],
)
def test_drill_command_mistake_is_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(DrillError) as caught:
        main([*arguments, f"output={tmp_path / 'drill'}"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "drill").exists()


def test_drill_output_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DrillError, match="this is the folder of a run"):
        main([DRILL, f"output={tmp_path}", "--kill", "worker:1@3"])
    assert (tmp_path / "run.json").read_text() == "{}"


def test_drill_command_wrong_spec_is_found_first(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"did you mean parallel\.tensor"):
        main([DRILL, f"output={tmp_path / 'drill'}", "parallel.tensr=1", "--kill", "worker:1@3"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_drill_signalled_as_it_starts_a_run_ends_with_130_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-P", "-c", SIGNALLED_AS_IT_STARTS.format(number=int(number)), DRILL]
    mark = {"KEEPWARM_TEST_SIGNALLED": str(tmp_path)}
    done = subprocess.run(
        [*command, "--kill", "worker:1@3", f"output={tmp_path / 'drill'}"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | mark,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (130, False), done.stderr
    assert done.stderr.endswith("keepwarm: interrupted\n")
    assert [
        each for each in psutil.process_iter(["environ"]) if mark.items() <= (each.info["environ"] or {}).items()
    ] == []


def test_drill_command_mistake_exits_2() -> None:
    command = [sys.executable, "-P", "-m", "keepwarm", "drill", DRILL, "--kill", "nodes:1,9@3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "keepwarm: --kill nodes:1,9@3: there is no node 9, the job has nodes 0 to 3\n"
    assert done.stdout == ""
