"""Signals in the first seconds of a run on nodes, while processes import and before anything trains."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from keepwarm.launch.node import record as node_record

ROOT = Path(__file__).parents[3]
DEADLINE = 120.0
GONE_S = 20.0
"""Within this time everything has ended; a store that waited for nodes to come back would take half a minute."""
pytestmark = pytest.mark.timeout(300)


def processes_of(folder: Path) -> list[psutil.Process]:
    """All processes of a run: forks show the command line of their parent."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if f"output={folder}" in (process.info["cmdline"] or ()):
            found.append(process)
    return found


def until(ready: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.01)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "keepwarm", "train", "ci/snapshot", f"output={tmp_path / 'run'}"]
    with subprocess.Popen(
        [*command, "--nodes", "4", "--spares", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield process
        for each in processes_of(tmp_path / "run"):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


FORK_SERVER, NODES, SUPERVISORS = 2, 3, 5
"""Processes of the command once its fork server, the parent of the nodes, and some of these exist."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("count", [FORK_SERVER, NODES, SUPERVISORS])
def test_signal_before_training_ends_with_130_and_one_sentence(
    launcher: subprocess.Popen[str], tmp_path: Path, count: int, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    until(lambda: len(processes_of(folder)) >= count, f"{count} processes")
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=DEADLINE)
    assert (launcher.returncode, "Traceback" in output) == (130, False), output
    assert output.splitlines()[-1].startswith("keepwarm: "), output
    until(lambda: processes_of(folder) == [], "all processes to end", GONE_S)
    assert not folder.exists() or node_record.newest_store(folder) is not None


def test_interrupt_while_supervisors_meet_leaves_no_store(launcher: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    until(lambda: node_record.newest_store(folder) is not None, "the store")
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=DEADLINE)
    assert (launcher.returncode, "Traceback" in output) == (130, False), output
    until(lambda: processes_of(folder) == [], "all processes to end", GONE_S)
