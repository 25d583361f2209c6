"""SIGTERM to the supervisors of one node, of some and of all: who leaves, and when the whole run saves and ends."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from keepwarm.launch.node import record as node_record
from keepwarm.launch.node import slot_table
from keepwarm.launch.node.membership import OPENING_TIMEOUT_S
from keepwarm.launch.node.slot_table import TERMINATION_GRACE_S as GRACE_S
from keepwarm.launch.node.slot_table import Table
from keepwarm.launch.node.slot_table import after_termination as decide
from keepwarm.trainer.monitor import events
from tests.launch.node.test_slot_table import arrived, started
from tests.launch.node.test_supervision import LAUNCHER, Cluster, cluster, names
from tests.support.runs.stand_ins import DEADLINE, alive

__all__ = ["cluster"]
pytestmark = pytest.mark.timeout(300)


def terminated(table: Table, *nodes: str) -> Table:
    for node in nodes:
        table = slot_table.terminate(table, node)
    return table


def test_one_node_waits_a_moment_for_others_and_then_leaves_to_a_spare() -> None:
    table = terminated(started(), "n1")
    assert decide(table, "n1", 0.0) == "wait"
    assert decide(table, "n1", GRACE_S) == "leave"
    draining = slot_table.drain(table, "n1", 0.0)
    assert decide(draining, "n1", GRACE_S) == "wait"
    left = slot_table.hand_over(draining, 0, 0.0, on_disk=False)
    assert decide(left, "n1", GRACE_S) == "wait"  # it is told that it was drained


def test_more_nodes_than_can_be_replaced_end_the_run_at_once() -> None:
    assert decide(terminated(started(spares=0), "n1"), "n1", 0.0) == "end"
    assert decide(terminated(started(), "n1", "s0"), "n1", 0.0) == "end"
    assert decide(terminated(started(), "n1", "n2"), "n1", 0.0) == "end"
    assert decide(terminated(started(spares=2), "n1", "n2"), "n1", 0.0) == "wait"
    smaller = msgspec.structs.replace(started(spares=0), sizes=(3, 2))
    assert decide(terminated(smaller, "n1"), "n1", GRACE_S) == "leave"
    assert decide(terminated(smaller, "n1", "n0"), "n1", GRACE_S) == "end"


def test_two_nodes_leave_one_after_the_other() -> None:
    table = slot_table.drain(terminated(started(spares=2), "n1", "n2"), "n1", 0.0)
    assert decide(table, "n2", GRACE_S) == "wait"
    table = slot_table.hand_over(table, 0, 0.0, on_disk=False)
    assert decide(table, "n2", GRACE_S) == "wait"  # the run restarts; its memory may be needed
    assert decide(arrived(table), "n2", GRACE_S) == "leave"


def test_node_without_a_slot_ends_at_once() -> None:
    assert decide(terminated(started(), "s0"), "s0", 0.0) == "end"
    assert decide(started(), "stranger", 0.0) == "end"


def test_termination_is_forgotten_with_its_node() -> None:
    table = terminated(started(), "n1", "stranger")
    assert table.terminated == ("n1",)
    assert terminated(slot_table.lose(table, "n1", "gone", 0.0), "n0").terminated == ("n0",)


def test_sigterm_of_one_node_has_it_leave_and_the_others_go_on(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=1)
    supervisor = run.running(0)[1].supervisor
    (run.folder / "saved").touch()
    os.kill(supervisor, signal.SIGTERM)
    assert names(run.running(1)) == ["n0", "n3", "n2"]
    run.until(lambda: not alive(supervisor), "its supervisor to end")
    assert [event.host for event in events.read(run.folder).of(events.NodeDrained)] == ["n1"]
    assert events.read(run.folder).of(events.Failure) == []
    run.end(0)
    ended = {event.node: event.code for event in events.read(run.folder).of(events.SupervisorEnded)}
    assert ended == {"n0": 0, "n1": 130, "n2": 0, "n3": 0}


def test_sigterm_of_one_node_without_a_spare_saves_and_ends_the_run(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=0)
    os.kill(run.running(0)[1].supervisor, signal.SIGTERM)
    run.until(lambda: (run.folder / "asked-1-0").exists(), "its rank to save")
    (run.folder / "saved").touch()
    assert run.process.wait(DEADLINE) == 130, run.log.read_text()
    assert events.read(run.folder).of(events.Failure, events.NodeDrained) == []
    run.assert_nothing_left()


def test_sigterm_of_all_supervisors_saves_and_ends_the_run(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=1)
    run.running(0)
    for record in node_record.read_all(run.folder):
        os.kill(record.supervisor, signal.SIGTERM)
    run.until(lambda: all((run.folder / f"asked-{rank}-0").exists() for rank in range(3)), "all ranks to save")
    (run.folder / "saved").touch()
    assert run.process.wait(DEADLINE) == 130, run.log.read_text()
    assert events.read(run.folder).of(events.Failure, events.NodeDrained) == []
    run.assert_nothing_left()


SIGNALLED_AFTER_THE_RENDEZVOUS = """
import os, signal
from keepwarm.launch.node.supervisor import Supervisor
def environment(self, before=Supervisor.environment):
    os.kill(os.getpid(), signal.SIGUSR1)
    return before(self)
Supervisor.environment = environment
"""


def test_signal_between_rendezvous_and_start_of_workers_ends_the_run(cluster: Callable[..., Cluster]) -> None:
    run = cluster(launcher=SIGNALLED_AFTER_THE_RENDEZVOUS + LAUNCHER)
    (run.folder / "saved").touch()
    assert run.process.wait(DEADLINE) == 130, run.log.read_text()
    run.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_nodes_look_for_a_store_ends_them_at_once(
    cluster: Callable[..., Cluster], tmp_path: Path, number: signal.Signals
) -> None:
    """Another node has claimed the first store and does not open it: they would wait for a minute."""
    node_record.claim_store(tmp_path, 0)
    run = cluster(spares=0)
    records = run.until(lambda: found if len(found := node_record.read_all(tmp_path)) == 3 else [], "all to look")
    for record in records:
        os.kill(record.supervisor, number)
    assert run.process.wait(OPENING_TIMEOUT_S / 2) == 130, run.log.read_text()
    assert "Traceback" not in run.log.read_text()
    assert node_record.newest_store(tmp_path) is None
