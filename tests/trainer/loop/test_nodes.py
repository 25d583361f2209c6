"""Runs on emulated nodes that lose parts of themselves, against one that does not: every loss and weight to the bit."""

import operator
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import DistError, TCPStore

from keepwarm.exit_code import ExitCode
from keepwarm.launch.node import record as node_record
from keepwarm.trainer.monitor import events
from tests.support.runs import warm
from tests.support.runs.node_fixtures import start, whole
from tests.support.runs.node_run import DEADLINE, Run, assert_equal, assert_nothing_left, command
from tests.support.runs.run_contents import steps_of, tensors_of
from tests.support.runs.stand_ins import wait_until_dead

__all__ = ["start", "whole"]
pytestmark = [pytest.mark.timeout(900), pytest.mark.dist]


def workers(run: Run) -> dict[int, int]:
    """Pids by rank."""
    return {rank: pid for slot in range(4) for rank, pid in run.owner(slot).workers.items()}


def changed(before: dict[int, int], after: dict[int, int]) -> set[int]:
    """Ranks that have another process."""
    return {rank for rank in before if before[rank] != after[rank]}


@pytest.mark.ci
def test_nodes_first_node_then_worker_lost_recovers_bitwise(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "--spares", "1")
    run.after(3)
    before = workers(run)
    run.lose_node(0)
    first = run.recovered(1)
    assert (first["level"], first["slots"], first["source"]) == ("decoded", [0], "memory")
    assert set(first["phases"]) == set(events.PHASES)
    assert run.owner(0).node == "node-4"
    run.until(lambda: [event for event in run.events("whole") if event["slots"] == [0]], "redundancy to be back")

    replaced = workers(run)
    assert changed(before, replaced) == {0}, "workers of other nodes begin again in the same process"
    os.kill(replaced[2], signal.SIGKILL)
    second = run.recovered(2)
    assert (second["level"], second["slots"], second["source"]) == ("local", [2], "memory")
    assert second["bytes_decoded"] == 0
    assert "SIGKILL" in second["why"]
    assert changed(replaced, workers(run)) == {2}
    run.done()
    assert_equal(run, whole)
    assert_nothing_left(run)


def test_nodes_worker_restarted_in_process_keeps_nothing(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4")
    run.after(3)
    first = workers(run)
    survivor = psutil.Process(first[3])

    def held() -> tuple[int, int, int]:
        return survivor.num_threads(), survivor.num_fds(), len(survivor.net_connections("tcp"))

    before = held()
    for count in range(1, 4):
        run.lose_worker(1)
        run.recovered(count)
        run.after(run.newest() + 2)
        # Threads that copy come and go; what is kept stays.
        run.until(
            lambda: all(map(operator.le, held(), before)), f"threads, descriptors and connections as before: {before}"
        )
    assert changed(first, workers(run)) == {1}
    run.done()
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.long
def test_nodes_worker_that_does_not_park_is_replaced(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4")
    run.after(3)
    before = workers(run)
    os.kill(before[3], signal.SIGSTOP)
    os.kill(before[1], signal.SIGKILL)
    run.recovered(1)
    assert changed(before, workers(run)) == {1, 3}
    run.done()
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.long
def test_nodes_in_process_off_replaces_all_workers(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "cluster.in_process=off")
    run.after(3)
    before = workers(run)
    run.lose_worker(1)
    run.recovered(1)
    assert changed(before, workers(run)) == {0, 1, 2, 3}
    run.done()
    assert_equal(run, whole)


@pytest.mark.long
def test_nodes_two_lost_at_once_with_store_recovers_bitwise(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "--spares", "2")
    run.after(3)
    run.owner(3)
    run.lose_node(1, with_store=True)
    run.lose_node(3)
    run.recovered(1)
    run.after(8)
    assert {run.owner(slot).node for slot in (1, 3)} == {"node-4", "node-5"}
    assert [run.owner(slot).node for slot in (0, 2)] == ["node-0", "node-2"]
    run.done()
    assert all(event["source"] == "memory" for event in run.events("recovery"))
    assert_equal(run, whole)
    assert_nothing_left(run)


def kill_launcher(run: Run) -> None:
    run.process.kill()
    assert run.process.wait(DEADLINE) == -signal.SIGKILL


def interrupt_again_and_again(run: Run) -> None:
    """Ask to end at once, in a step that one rank does not finish, so that nothing is saved."""
    os.kill(workers(run)[2], signal.SIGSTOP)
    deadline = time.monotonic() + DEADLINE
    while (code := run.process.poll()) is None:
        run.process.send_signal(signal.SIGINT)
        assert time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.1)
    assert code == ExitCode.INTERRUPTED


@pytest.mark.parametrize("end", [kill_launcher, interrupt_again_and_again])
def test_nodes_run_that_ended_without_a_checkpoint_resumes_from_memory(
    whole: Path, start: Callable[..., Run], end: Callable[[Run], None]
) -> None:
    run = start("--nodes", "4")
    run.after(3)
    supervisors = {run.owner(slot).supervisor for slot in range(4)}
    end(run)
    wait_until_dead(supervisors)
    assert not list((run.folder / "checkpoints").glob("iter_*"))
    done = warm.run(["train", str(run.folder), "--resume", "--nodes", "4"], timeout=DEADLINE)
    assert done.returncode == 0, done.stdout
    began = run.events("began")[-1]
    assert began["source"] == "memory"
    assert began["step"] >= 1
    assert_equal(run, whole)
    assert_nothing_left(run)


def copy_of(folder: Path, copy: Path) -> None:
    """Copy a folder whose files come and go: agents may be publishing a checkpoint."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            shutil.copytree(folder, copy)
            return
        except (shutil.Error, FileNotFoundError):
            assert time.monotonic() < deadline
            shutil.rmtree(copy, ignore_errors=True)


def test_nodes_copy_of_a_run_whose_agents_live_shares_nothing_with_it(whole: Path, start: Callable[..., Run]) -> None:
    """The original goes on from its memory and the copy from the disk, at the same time."""
    run = start("--nodes", "4", "snapshot.durable.every=3")
    run.until(lambda: list((run.folder / "checkpoints").glob("iter_*")), "a checkpoint")
    run.after(run.newest() + 2)
    supervisors = {run.owner(slot).supervisor for slot in range(4)}
    kill_launcher(run)
    wait_until_dead(supervisors)
    copy = run.folder.with_name("copy")
    copy_of(run.folder, copy)
    for question in (["drain", str(copy), "node-1"], ["snapshots", str(copy)]):
        refused = warm.run(question, timeout=DEADLINE)
        assert refused.returncode == 2, refused.stdout
        assert f"this is a copy of {run.folder}, and no run of its own before it is resumed" in refused.stdout
    logs = {folder: folder.with_suffix(".again") for folder in (run.folder, copy)}
    starts = {f: warm.Process(["train", str(f), "--resume", "--nodes", "4"], log) for f, log in logs.items()}
    for folder, process in starts.items():
        assert process.wait(DEADLINE) == 0, logs[folder].read_text()
    mine, theirs = ([event.source for event in events.read(folder).of(events.Began)] for folder in (run.folder, copy))
    assert (mine[-1], theirs[-1]) == ("memory", "disk")
    for folder in (run.folder, copy):
        assert steps_of(folder) == steps_of(whole)
        assert tensors_of(folder) == tensors_of(whole)
    assert "is a copy of" not in logs[run.folder].read_text()
    assert f"{copy}: this is a copy of {run.folder}" in logs[copy].read_text()
    assert_nothing_left(run)


def kill_supervisor(run: Run) -> None:
    os.kill(run.owner(1).supervisor, signal.SIGKILL)


def kill_agent(run: Run) -> None:
    run.crash_agents([1])


def kill_keeper(run: Run) -> None:
    run.lose_agents([1])


def kill_store(run: Run) -> None:
    store = node_record.newest_store(run.folder)
    assert store is not None
    os.kill(store.pid, signal.SIGKILL)


def ask_as_torch_does(port: int) -> str:
    """What a process gets that is no worker: set a key, read the greeting of a rank, delete it."""
    try:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=1), wait_for_workers=False)
        store.set("device/verdict", "end")
        return f"port {port}: {store.num_keys()} keys, {store.delete_key('device/verdict')}"
    except DistError:
        return ""


def listening(pids: Collection[int | None]) -> set[int]:
    """Every TCP port at which one of these processes listens."""
    found = set[int]()
    for pid in pids:
        sockets = psutil.Process(pid).net_connections("tcp")
        found |= {one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.ci
def test_nodes_strangers_with_torchs_client_at_every_port_change_nothing(
    whole: Path, start: Callable[..., Run]
) -> None:
    """Restarts read the store: a worker is lost after what strangers have tried."""
    run = start("--nodes", "4")
    run.after(3)
    owners = [run.owner(slot) for slot in range(4)]
    store = node_record.newest_store(run.folder)
    assert store is not None
    ports = listening([store.pid, *(pid for one in owners for pid in (one.supervisor, one.agent))])
    assert len(ports) == 2 + 4 * 3  # a supervisor has one for others and one for its workers
    of_gloo = listening(workers(run).values())
    with ThreadPoolExecutor(len(ports) + len(of_gloo)) as pool:
        silent = [pool.submit(ask_as_torch_does, port) for port in of_gloo]
        try:
            assert set(pool.map(ask_as_torch_does, ports)) == {""}
            run.lose_worker(1)
            run.done()
        finally:
            run.process.kill()  # gloo answers nothing while it lives
        assert {one.result(DEADLINE) for one in silent} == {""}
    assert [event["kind"] for event in run.events("failure")] == ["killed"]
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.long
@pytest.mark.parametrize("fault", [kill_supervisor, kill_agent, kill_keeper, kill_store])
def test_nodes_single_component_lost_recovers_bitwise(
    whole: Path, start: Callable[..., Run], fault: Callable[[Run], None]
) -> None:
    run = start("--nodes", "4", "--spares", "1")
    run.after(3)
    fault(run)
    run.done()
    failures = [event["kind"] for event in run.events("failure")]
    kinds = {kill_supervisor: "lost", kill_agent: "agent", kill_keeper: "agent", kill_store: "store"}
    assert kinds[fault] in failures
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.ci
def test_nodes_all_agents_lost_at_once_recovers_from_memory_bitwise(whole: Path, start: Callable[..., Run]) -> None:
    """More agents than the parity bears die, as from one defect. A worker that dies too costs no memory either."""
    run = start("--nodes", "4")
    run.after(5)
    before = workers(run)
    kept = {slot: run.owner(slot).keeper for slot in range(4)}
    run.crash_agents(range(4))
    run.until(lambda: len(run.events("failure")) == 4, "supervisors to see it")
    assert {event["kind"] for event in run.events("failure")} == {"agent"}
    assert all("its memory is kept" in event["cause"] for event in run.events("failure"))
    run.after(run.newest() + 5)
    assert workers(run) == before, "no worker was started again"
    assert {slot: run.owner(slot).keeper for slot in range(4)} == kept

    os.kill(before[2], signal.SIGSTOP)
    step = run.settled(2)
    run.crash_agents(range(4))
    os.kill(before[2], signal.SIGKILL)
    recovery = run.recovered(1)
    assert (recovery["level"], recovery["source"], recovery["step"]) == ("local", "memory", step)
    assert recovery["bytes_decoded"] == 0
    run.done()
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.long
def test_nodes_frozen_node_is_fenced_when_it_resumes(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "--spares", "1", "snapshot.peer_timeout=2.0")
    run.after(3)
    record = run.owner(2)
    frozen = [record.supervisor, record.keeper, record.agent, *record.workers.values()]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    recovery = run.recovered(1)
    assert (recovery["level"], recovery["slots"]) == ("decoded", [2])
    assert recovery["phases"]["detect"] == 2.0
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    run.done()
    assert [record.slot for record in node_record.read_all(run.folder) if record.node == "node-4"] == [2]
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.long
def test_nodes_more_lost_than_parity_restarts_from_disk(whole: Path, start: Callable[..., Run]) -> None:
    run = start("--nodes", "4", "--spares", "3")
    run.after(12)
    for slot in (0, 1, 2):
        run.owner(slot)
    for slot in (0, 1, 2):
        run.lose_node(slot)
    recovery = run.recovered(1)
    assert recovery["level"] == "disk"
    assert recovery["source"] in ("disk", "nothing")
    assert "needs 2 good chunks" in recovery["why"] or "no agent holds" in recovery["why"]
    run.done()
    assert_equal(run, whole)


def test_nodes_number_other_than_layout_is_refused(tmp_path: Path) -> None:
    done = warm.run(command(tmp_path / "run", "--nodes", "3"), timeout=DEADLINE)
    assert done.returncode == 2
    assert "the layout has 4 ranks" in done.stdout
    assert "give --nodes 4" in done.stdout
    assert not (tmp_path / "run").exists()
