"""Memory that loses its redundancy between two snapshots far apart: the ranks take one at once."""

import os
import signal
from collections.abc import Callable

import pytest

from keepwarm.exit_code import ExitCode
from keepwarm.launch.cli.snapshots import ask
from keepwarm.launch.errors import SnapshotsError
from tests.support.runs.node_fixtures import start
from tests.support.runs.node_run import DEADLINE, Run, assert_nothing_left

__all__ = ["start"]
pytestmark = [pytest.mark.timeout(900), pytest.mark.dist]
SELDOM = ("snapshot={every: 100000, code: {data: 2, parity: 2}}", f"stages.0.tokens={20_000 * 512}")


def committed(run: Run) -> int | None:
    """The newest step that all four agents know to be committed."""
    try:
        found, _ = ask(run.folder)
    except SnapshotsError:
        return None
    ages = [status.committed for status in found if status.mode == "active" and len(status.workers) == 1]
    return min(age[1] for age in ages if age is not None) if len(ages) == 4 and None not in ages else None


@pytest.mark.ci
def test_nodes_all_memory_lost_while_training_takes_a_snapshot_at_once(start: Callable[..., Run]) -> None:
    """Otherwise only the ranks would hold the state until the next one is due."""
    run = start("--nodes", "4", *SELDOM)
    run.after(3)
    first = run.until(lambda: committed(run), "the first snapshot")
    run.lose_agents(range(4))
    hastened = run.until(lambda: run.events("redundancy_lost"), "the ranks to see it")[-1]
    assert hastened["step"] > first
    run.until(lambda: (committed(run) or 0) >= hastened["step"], "a snapshot before its time")
    os.kill(run.owner(0).workers[0], signal.SIGKILL)
    recovery = run.recovered(1)
    assert recovery["source"] == "memory"
    assert recovery["step"] >= hastened["step"]
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(DEADLINE) == ExitCode.INTERRUPTED, run.log.read_text()
    assert_nothing_left(run)
