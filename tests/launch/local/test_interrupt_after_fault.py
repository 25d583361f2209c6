"""Ctrl-C while a run on nodes recovers from a killed worker: what was committed in memory is not lost."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from keepwarm.launch.cli.status import committed
from keepwarm.launch.node import record as node_record
from tests.support.runs import warm
from tests.support.runs.node_fixtures import start, whole
from tests.support.runs.node_run import DEADLINE, Run, assert_equal, assert_nothing_left

__all__ = ["start", "whole"]
pytestmark = [pytest.mark.timeout(900), pytest.mark.dist]


def at_once(run: Run) -> bool:
    return True


def failure_is_recorded(run: Run) -> bool:
    return bool(run.events("failure"))


def workers_are_ended(run: Run) -> bool:
    return any(record.state == "restarting" for record in node_record.read_all(run.folder))


def agents_have_decided(run: Run) -> bool:
    return len(list((run.folder / "agents").glob("choice-*.json"))) > 1


def workers_run_again(run: Run) -> bool:
    records = node_record.read_all(run.folder)
    return any(record.state == "running" and record.restart == 1 for record in records)


def training_has_recovered(run: Run) -> bool:
    return bool(run.events("recovery"))


@pytest.mark.parametrize(
    "moment",
    [
        at_once,
        pytest.param(failure_is_recorded, marks=pytest.mark.long),
        pytest.param(workers_are_ended, marks=pytest.mark.long),
        agents_have_decided,
        pytest.param(workers_run_again, marks=pytest.mark.long),
        pytest.param(training_has_recovered, marks=pytest.mark.long),
    ],
)
def test_interrupt_during_a_recovery_loses_no_committed_step(
    whole: Path, start: Callable[..., Run], moment: Callable[[Run], bool]
) -> None:
    run = start("--nodes", "4")
    run.after(3)
    for slot in range(4):
        run.owner(slot)
    before = run.until(lambda: committed(run.folder), "a committed snapshot")
    run.lose_worker(2)
    run.until(lambda: moment(run), "the moment")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(DEADLINE) == 130, run.log.read_text()
    assert "Traceback" not in run.log.read_text()
    done = warm.run(["train", str(run.folder), "--resume", "--nodes", "4"], timeout=DEADLINE)
    assert done.returncode == 0, done.stdout
    began = run.events("began")[-1]
    assert began["step"] >= before[1], (began, run.log.read_text())
    assert_equal(run, whole)
    assert_nothing_left(run)
