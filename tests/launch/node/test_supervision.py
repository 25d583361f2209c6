"""Supervisors as processes, with stand-ins for workers: which node takes which slot when something dies or freezes."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.launch.node import record as node_record
from keepwarm.launch.node.record import NodeRecord
from keepwarm.trainer.monitor import events
from tests.support.runs.stand_ins import DEADLINE, REUSABLE, WORKER, StandIns, alive, wait_until_dead

pytestmark = pytest.mark.timeout(300)

LAUNCHER = """
import sys
from pathlib import Path
from typing import Any
from keepwarm.launch import forkserver
forkserver.PRELOADED = ()
from keepwarm.launch.local.emulated_nodes import Nodes
from keepwarm.launch.node.options import Options
from keepwarm.trainer.job.files import load_job, save_job
folder, peer_timeout, spares, slots = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
off = [f"output={folder}", "snapshot=off"]
job = load_job(Path("ci/snapshot"), [*off, f"parallel.data={slots}", "batch.global_batch_size=9", *sys.argv[5:]])
save_job(job, folder / "run.json")
import keepwarm.launch.node.supervisor
keepwarm.launch.node.supervisor.PEER_TIMEOUT_S = float(peer_timeout)
nodes = [
    Options(folder=folder, slots=slots, node=f"n{i}", ranks_per_node=1, requested_slot=i if i < slots else "spare",
            vacancy_timeout=60.0, module="stand_in")
    for i in range(slots + spares)
]
sys.exit(Nodes(nodes, job).run())
"""


class Cluster(StandIns):
    """Some slots and spares."""

    def __init__(
        self,
        folder: Path,
        spares: int,
        peer_timeout: float,
        worker: str,
        *,
        slots: int = 3,
        more: tuple[str, ...] = (),
        launcher: str = LAUNCHER,
    ) -> None:
        super().__init__(folder, launcher, str(peer_timeout), str(spares), str(slots), *more, worker=worker)

    def ran(self, restart: int, slots: int = 3) -> None:
        """Wait until all workers of a restart run."""
        self.until(
            lambda: all((self.folder / f"ran-{rank}-{restart}").exists() for rank in range(slots)),
            f"workers of restart {restart}",
        )

    def running(self, restart: int, slots: int = 3) -> dict[int, NodeRecord]:
        """The owners by slot, once all workers of a restart run."""
        self.ran(restart, slots)

        def owners() -> dict[int, NodeRecord]:
            records = [each for each in node_record.read_all(self.folder) if each.restart == restart]
            found = {each.slot: each for each in records if each.slot is not None and each.state == "running"}
            return found if len(found) == slots else {}

        found: dict[int, NodeRecord] = self.until(owners, f"the records of restart {restart}")
        return found

    def pid(self, rank: int, restart: int) -> int:
        return int((self.folder / f"ran-{rank}-{restart}").read_text())

    def end(self, code: int = 0) -> None:
        super().end(code)
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        store = node_record.newest_store(self.folder)
        assert store is not None
        workers = {int(path.read_text()) for path in self.folder.glob("ran-*")}
        wait_until_dead({store.pid} | workers | {record.supervisor for record in node_record.read_all(self.folder)})


def names(owners: dict[int, NodeRecord]) -> list[str]:
    return [owners[slot].node for slot in sorted(owners)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(spares: int = 1, peer_timeout: float = 30.0, worker: str = WORKER, **options: Any) -> Cluster:
        made.append(Cluster(tmp_path, spares, peer_timeout, worker, **options))
        return made[-1]

    yield make
    for each in made:
        each.kill()


def test_signals_to_every_process_save_and_end_run(cluster: Callable[..., Cluster]) -> None:
    """As SLURM does, more than once: before a time limit, at it, and when a job is cancelled or requeued."""
    run = cluster()
    owners = run.running(0)
    store = node_record.newest_store(run.folder)
    assert store is not None
    supervisors = [record.supervisor for record in node_record.read_all(run.folder)]
    workers = [pid for record in owners.values() for pid in record.workers.values()]
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        for pid in (store.pid, *supervisors, *workers):
            os.kill(pid, number)
    run.until(lambda: all((run.folder / f"asked-{rank}-0").exists() for rank in range(3)), "all ranks to save")
    assert alive(store.pid)
    (run.folder / "saved").touch()
    assert run.process.wait(DEADLINE) == 130, run.log.read_text()
    assert events.read(run.folder).of(events.Failure) == []
    run.assert_nothing_left()


def test_workers_that_die_repeatedly_exclude_their_node(cluster: Callable[..., Cluster]) -> None:
    run = cluster()
    (supervisor,) = (record.supervisor for record in run.running(0).values() if record.slot == 1)
    for restart in range(3):
        assert names(run.running(restart)) == ["n0", "n1", "n2"]
        os.kill(run.pid(1, restart), signal.SIGKILL)
    assert names(run.running(3)) == ["n0", "n3", "n2"]
    run.until(lambda: not alive(supervisor), "the supervisor of the excluded node")
    (excluded,) = events.read(run.folder).of(events.NodeExcluded)
    assert excluded.host == "n1"
    assert "failed 3 times, most recently: rank 1 was ended by SIGKILL" in excluded.why
    run.end()


LEAVES_WORDS = """
import os, pathlib, sys, time
from keepwarm.trainer.monitor import last_words
folder = pathlib.Path(sys.argv[1]).parent
me = f"{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
(folder / f".{me}").write_text(str(os.getpid()))
(folder / f".{me}").rename(folder / f"ran-{me}")
while not (folder / "code").exists():
    if (folder / f"end-{me}").exists():
        code, kind, *about = (folder / f"end-{me}").read_text().split()
        hang = kind == "Hang"
        last_words.leave(last_words.Hang(tuple(map(int, about))) if hang else getattr(last_words, kind)(*about))
        sys.exit(int(code)) if int(code) > 0 else os.kill(os.getpid(), -int(code))
    time.sleep(0.01)
sys.exit(int((folder / "code").read_text()))
"""
"""A worker that leaves the last words in the file `end-<rank>-<restart>`, and ends with its code or by its signal."""


def test_last_words_decide_whether_a_node_is_replaced(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=2, worker=LEAVES_WORDS, more=("cluster.max_restarts=9",))

    def end(rank: int, restart: int, words: str) -> None:
        (run.folder / ".end").write_text(words)
        (run.folder / ".end").rename(run.folder / f"end-{rank}-{restart}")

    for restart in range(4):
        run.running(restart)
        end(2, restart, "-6 OnGpu")  # as NCCL's watchdog ends a healthy rank
    assert names(run.running(4)) == ["n0", "n1", "n2"]
    end(0, 4, "5 Hang 1")
    assert names(run.running(5)) == ["n0", "n1", "n2"]
    end(2, 5, "5 Hang 1")
    replaced = names(run.running(6))
    assert [replaced[0], replaced[2]] == ["n0", "n2"]
    assert replaced[1] in ("n3", "n4")
    end(0, 6, "1 BrokenGpu NVLink")
    assert not {"n0", "n1"} & set(names(run.running(7)))

    def found() -> list[events.NodeExcluded]:
        return events.read(run.folder).of(events.NodeExcluded)

    # The supervisor of an excluded node ends, and says why, while the others go on.
    excluded = run.until(lambda: found() if len(found()) == 2 else [], "the reasons of both excluded nodes")
    assert {event.host: event.why.partition(" is excluded: ")[2] for event in excluded} == {
        "n0": "rank 0: NVLink",
        "n1": "its workers failed 2 times, most recently: rank 2 detected a hang: the others wait for rank 1",
    }
    run.end()


UNDEAD = """
import os, pathlib, signal, sys
from keepwarm.launch import rank_processes
rank_processes.KILL_TIMEOUT_S = 0.5
def kill(pid, number, kill=os.kill):
    if number != signal.SIGKILL or not (pathlib.Path(sys.argv[1]) / f"undead-{pid}").exists():
        kill(pid, number)
os.kill = kill
"""
"""SIGKILL has no effect on a process while the file `undead-<pid>` exists."""


def test_worker_that_outlives_sigkill_fences_its_node(cluster: Callable[..., Cluster]) -> None:
    run = cluster(launcher=UNDEAD + LAUNCHER)
    supervisor = run.running(0)[1].supervisor
    pid = run.pid(1, 0)
    (run.folder / f"undead-{pid}").touch()
    os.kill(run.pid(0, 0), signal.SIGKILL)
    assert names(run.running(1)) == ["n0", "n3", "n2"]
    run.until(lambda: not alive(supervisor), "the supervisor of the fenced node")
    (excluded,) = events.read(run.folder).of(events.NodeExcluded)
    assert excluded.host == "n1"
    assert f"process {pid} is still there" in excluded.why
    run.end()


def test_node_worker_and_store_deaths_are_each_survived(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=2)
    owners = run.running(0)
    assert names(owners) == ["n0", "n1", "n2"]
    assert [owners[slot].workers for slot in range(3)] == [{slot: run.pid(slot, 0)} for slot in range(3)]

    os.kill(owners[0].supervisor, signal.SIGKILL)
    replacement = names(run.running(1))[0]
    assert replacement in ("n3", "n4")  # the longest waiting spare
    (last,) = {"n3", "n4"} - {replacement}
    assert names(run.running(1)) == [replacement, "n1", "n2"]
    assert not any(alive(run.pid(rank, 0)) for rank in range(3))

    os.kill(run.pid(2, 1), signal.SIGKILL)
    assert names(run.running(2)) == [replacement, "n1", "n2"]

    store = node_record.newest_store(run.folder)
    assert store is not None
    os.kill(store.pid, signal.SIGKILL)
    owners = run.running(3)
    assert names(owners) == [replacement, "n1", "n2"]
    assert node_record.newest_claim(run.folder) == 1

    store = node_record.newest_store(run.folder)
    assert store is not None
    for pid in (store.pid, owners[1].supervisor):
        os.kill(pid, signal.SIGKILL)
    assert names(run.running(4)) == [replacement, last, "n2"]

    failures = [(event.kind, event.slots) for event in events.read(run.folder).of(events.Failure)]
    assert ("lost", (0,)) in failures
    assert ("killed", (2,)) in failures
    assert ("store", ()) in failures
    run.end(0)


def test_reusable_workers_outside_fault_resumed_own_failure_replaced(
    cluster: Callable[..., Cluster],
) -> None:
    patient = LAUNCHER.replace("PRELOADED = ()", "PRELOADED, forkserver.PARK_TIMEOUT_S = (), 10.0")
    run = cluster(spares=1, worker=REUSABLE, launcher=patient)
    supervisor = run.running(0)[0].supervisor
    os.kill(run.pid(1, 0), signal.SIGKILL)
    run.running(1)
    assert [run.pid(rank, 1) == run.pid(rank, 0) for rank in range(3)] == [True, False, True]

    os.kill(supervisor, signal.SIGKILL)  # and with it the node's worker
    run.running(2)
    assert [run.pid(rank, 2) == run.pid(rank, 1) for rank in range(3)] == [False, True, True]

    os.kill(run.pid(2, 2), signal.SIGSTOP)  # it cannot park
    os.kill(run.pid(1, 2), signal.SIGKILL)
    run.running(3)
    assert [run.pid(rank, 3) == run.pid(rank, 2) for rank in range(3)] == [True, False, False]

    (run.folder / "fail-0-3").touch()
    run.running(4)
    assert not {run.pid(rank, 4) for rank in range(3)} & {run.pid(rank, 3) for rank in range(3)}
    assert not any(alive(run.pid(rank, 3)) for rank in range(3))
    run.end()


def test_frozen_node_is_fenced_and_becomes_spare(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=1, peer_timeout=2.0)
    frozen = run.running(0)[1]
    os.kill(frozen.supervisor, signal.SIGSTOP)
    assert names(run.running(1)) == ["n0", "n3", "n2"]
    assert alive(run.pid(1, 0))  # its supervisor could not end it
    os.kill(frozen.supervisor, signal.SIGCONT)

    def spare() -> bool:
        return any(record.node == "n1" and record.state == "spare" for record in node_record.read_all(run.folder))

    run.until(spare, "n1 to come back as a spare")
    assert not alive(run.pid(1, 0))
    os.kill(run.running(1)[2].supervisor, signal.SIGKILL)
    assert names(run.running(2)) == ["n0", "n3", "n1"]
    run.end(3)


def test_node_frozen_with_its_store_follows_the_next_one_and_becomes_spare(cluster: Callable[..., Cluster]) -> None:
    """Its store would let it decide alone if it took the others for dead."""
    run = cluster(spares=1, peer_timeout=2.0)
    frozen, store = run.running(0)[0], node_record.newest_store(run.folder)
    assert store is not None
    stopped = [store.pid, frozen.supervisor, *frozen.workers.values()]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert names(run.running(1)) == ["n3", "n1", "n2"]
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)

    def spare() -> bool:
        return any(record.node == "n0" and record.state == "spare" for record in node_record.read_all(run.folder))

    run.until(spare, "n0 to come back as a spare")
    lost = [event.node for event in events.read(run.folder).of(events.Failure) if event.kind == "lost"]
    assert lost == ["n0"]
    assert node_record.read_end(run.folder) is None
    run.end(3)


def test_hosts_of_stores_that_freeze_in_turn_all_come_back_as_spares(cluster: Callable[..., Cluster]) -> None:
    """Each wakes up beside the store that it had, which another one may still follow."""
    run = cluster(spares=1, peer_timeout=1.0)
    run.ran(0)

    def state(node: str) -> str:
        return next(record.state for record in node_record.read_all(run.folder) if record.node == node)

    store = node_record.newest_store(run.folder)
    assert store is not None
    os.kill(store.pid, signal.SIGKILL)
    for restart in range(1, 5):
        owners = {owner.node: owner for owner in run.running(restart).values()}
        store = node_record.newest_store(run.folder)
        opened = [event.node for event in events.read(run.folder).of(events.Failure) if event.kind == "store"]
        assert store is not None
        assert len(opened) == restart
        host = owners[opened[-1]]
        stopped = [store.pid, host.supervisor, *host.workers.values()]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        run.ran(restart + 1)
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):  # its supervisor, which is awake, may have ended a worker
                os.kill(pid, signal.SIGCONT)
        run.until(lambda: state(host.node) == "spare", f"{host.node} to come back as a spare")  # noqa: B023
    run.end(3)


def test_lost_node_without_spare_ends_run_with_reason(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=0, launcher=LAUNCHER.replace("vacancy_timeout=60.0", "vacancy_timeout=1.0"))
    os.kill(run.running(0)[1].supervisor, signal.SIGKILL)
    assert run.process.wait(DEADLINE) == 4
    assert "waited 1 s for a node to take slot 1: no spare is left" in run.log.read_text()


SHRINK = ("batch.global_batch_size=8", "cluster.elastic=shrink", "cluster.shrink_after=0.2", "checkpoint.every=100")


def test_store_lost_after_a_shrink_keeps_the_smaller_run(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=0, slots=4, more=SHRINK)
    os.kill(run.running(0, 4)[3].supervisor, signal.SIGKILL)
    assert names(run.running(1, 2)) == ["n0", "n1"]
    os.kill(run.pid(0, 1), signal.SIGKILL)
    run.running(2, 2)
    store = node_record.newest_store(run.folder)
    assert store is not None
    os.kill(store.pid, signal.SIGKILL)
    assert names(run.running(3, 2)) == ["n0", "n1"]
    assert len(events.read(run.folder).of(events.Resized)) == 1
    assert len(node_record.stores(run.folder)) == 2
    run.end()


def test_blame_outlives_the_store(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=1)
    run.running(0)
    for restart in range(2):
        os.kill(run.pid(1, restart), signal.SIGKILL)
        run.running(restart + 1)
    store = node_record.newest_store(run.folder)
    assert store is not None
    os.kill(store.pid, signal.SIGKILL)
    run.running(3)
    os.kill(run.pid(1, 3), signal.SIGKILL)
    assert names(run.running(4)) == ["n0", "n3", "n2"]
    (excluded,) = events.read(run.folder).of(events.NodeExcluded)
    assert (excluded.host, "failed 3 times" in excluded.why) == ("n1", True)
    run.end()


def test_most_owners_and_the_store_killed_the_last_one_goes_on(cluster: Callable[..., Cluster]) -> None:
    """Their machine says that the processes have ended, so that one of three decides."""
    run = cluster(spares=2)
    owners = run.running(0)
    store = node_record.newest_store(run.folder)
    assert store is not None
    for pid in (store.pid, owners[0].supervisor, owners[1].supervisor):
        os.kill(pid, signal.SIGKILL)
    assert names(run.running(1))[2] == "n2"
    assert set(names(run.running(1))) == {"n2", "n3", "n4"}
    run.end()


def test_run_folder_that_takes_no_record_ends_nothing(cluster: Callable[..., Cluster]) -> None:
    run = cluster(spares=1)
    owners = run.running(0)
    store = node_record.newest_store(run.folder)
    assert store is not None
    nodes, log = run.folder / "nodes", run.folder / "events.jsonl"
    nodes.rename(run.folder / "away")
    nodes.touch()
    log.unlink()
    log.symlink_to("/dev/full")
    os.kill(run.pid(1, 0), signal.SIGKILL)
    run.ran(1)
    os.kill(store.pid, signal.SIGKILL)
    run.ran(2)
    os.kill(owners[0].supervisor, signal.SIGKILL)
    run.ran(3)
    StandIns.end(run, 0)
    wait_until_dead({owner.supervisor for owner in owners.values()})
    assert "records and events are being lost" in run.log.read_text()


def test_defect_of_a_supervisor_is_shown_with_its_traceback(tmp_path: Path) -> None:
    broken = LAUNCHER.replace(
        "sys.exit(Nodes", "def broken(*_):\n    raise ValueError('a defect')\n"
        "keepwarm.launch.node.supervisor.supervise = broken\nsys.exit(Nodes",
    )  # fmt: skip
    run = StandIns(tmp_path, broken, "5", "0", "2", "batch.global_batch_size=8")
    assert run.process.wait(DEADLINE) == 1
    assert run.log.read_text().count("ValueError: a defect") == 2
