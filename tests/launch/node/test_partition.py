"""A network partition that heals: at no time do both halves train, and one node that is cut off disturbs no other.

Each supervisor is in a network namespace of its own, on one of two bridges with a cable between them. A node that is
cut off alone has its packets swallowed, as behind a router: nothing tells it, or the others, that it cannot be reached.
Every node still sees the run folder.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepwarm.launch.node import record as node_record
from tests.support.runs.stand_ins import StandIns, alive, wait_until_dead

SLOTS = 4
SILENCE = 2.0
"""Seconds after which a node is considered dead."""
HALF = 2
"""Nodes 0 and 1 are on one side with all spares, nodes 2 and 3 on the other."""
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
    ),
]

LAUNCHER = """
import ctypes, os, sys
from pathlib import Path
from keepwarm.launch import forkserver
forkserver.PRELOADED = ()
import keepwarm.launch.node.supervisor
from keepwarm.launch.local.emulated_nodes import Nodes
from keepwarm.launch.node.options import Options
from keepwarm.trainer.job.files import load_job, save_job
folder, namespaces = Path(sys.argv[1]), sys.argv[3:]
off = [f"output={folder}", "snapshot=off"]
job = load_job(Path("ci/snapshot"), [*off, "parallel.data=4", "batch.global_batch_size=8"])
save_job(job, folder / "run.json")
keepwarm.launch.node.supervisor.PEER_TIMEOUT_S = float(sys.argv[2])
supervise = keepwarm.launch.node.supervisor.supervise

def apart(options, job):
    place = os.open(f"/run/netns/{namespaces[int(options.node[1:])]}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(place, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")
    return supervise(options, job)

keepwarm.launch.node.supervisor.supervise = apart
nodes = [
    Options(folder=folder, slots=4, node=f"n{i}", host=f"10.78.0.{i + 1}", ranks_per_node=1,
            requested_slot=i if i < 4 else "spare", vacancy_timeout=300.0, module="stand_in")
    for i in range(len(namespaces))
]
sys.exit(Nodes(nodes, job).run())
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _mac(index: int) -> str:
    return f"02:00:00:00:00:{index + 1:02x}"


class Network:
    """`nodes` namespaces, and one with a bridge for each half and a cable between them."""

    def __init__(self, nodes: int) -> None:
        self.name = f"kwp{os.getpid()}"
        self.nodes = [f"{self.name}n{index}" for index in range(nodes)]
        self.made: list[str] = []

    def open(self) -> None:
        for namespace in (self.name, *self.nodes):
            ip("netns", "add", namespace)
            self.made.append(namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        for bridge in ("b0", "b1"):
            ip("-n", self.name, "link", "add", bridge, "type", "bridge")
            ip("-n", self.name, "link", "set", bridge, "up")
        ip("-n", self.name, "link", "add", "c0", "type", "veth", "peer", "name", "c1")
        for side in "01":
            ip("-n", self.name, "link", "set", f"c{side}", "master", f"b{side}", "up")
        for index, namespace in enumerate(self.nodes):
            side = int(HALF <= index < SLOTS)
            ip("-n", self.name, "link", "add", f"v{index}", "type", "veth", "peer", "name", "e0", "netns", namespace)
            ip("-n", self.name, "link", "set", f"v{index}", "master", f"b{side}", "up")
            ip("-n", namespace, "link", "set", "e0", "address", _mac(index))
            ip("-n", namespace, "addr", "add", f"10.78.0.{index + 1}/24", "dev", "e0")
            ip("-n", namespace, "link", "set", "e0", "up")
            for other in range(len(self.nodes)):
                # Known for good, so that nothing fails early because an address does not answer.
                if other != index:
                    address = f"10.78.0.{other + 1}"
                    ip("-n", namespace, "neigh", "add", address, "lladdr", _mac(other), "dev", "e0", "nud", "permanent")

    def cut_off(self, index: int) -> None:
        """Swallow all packets from and to one node."""
        ip("-n", self.name, "link", "set", f"v{index}", "nomaster")

    def plug_in(self, index: int) -> None:
        ip("-n", self.name, "link", "set", f"v{index}", "master", f"b{int(HALF <= index < SLOTS)}")

    def cable(self, state: str) -> None:
        ip("-n", self.name, "link", "set", "c0", state)

    def close(self) -> None:
        for namespace in self.made:
            ip("netns", "del", namespace)


class Cluster(StandIns):
    """Four slots on nodes in different namespaces."""

    def __init__(self, folder: Path, network: Network) -> None:
        super().__init__(folder, LAUNCHER, str(SILENCE), *network.nodes)

    def workers(self) -> dict[int, dict[int, int]]:
        """Return pids by rank for each restart."""
        found: dict[int, dict[int, int]] = {}
        for path in self.folder.glob("ran-*"):
            _, rank, restart = path.name.split("-")
            found.setdefault(int(restart), {})[int(rank)] = int(path.read_text())
        return found

    def training(self) -> list[int]:
        """Return the restarts of which all workers run."""
        restarts = sorted(self.workers().items())
        return [number for number, pids in restarts if len(pids) == SLOTS and all(map(alive, pids.values()))]

    def owners(self, restart: int) -> set[str]:
        return {record.node for record in node_record.read_all(self.folder) if record.restart == restart}


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Callable[[int], tuple[Network, Cluster]]]:
    made: list[tuple[Network, Cluster]] = []

    def make(nodes: int) -> tuple[Network, Cluster]:
        network = Network(nodes)
        try:
            network.open()
        except subprocess.CalledProcessError as error:
            network.close()
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        made.append((network, Cluster(tmp_path, network)))
        return made[-1]

    yield make
    for network, cluster in made:
        cluster.process.kill()
        cluster.process.wait()
        wait_until_dead({record.supervisor for record in node_record.read_all(tmp_path)})
        store = node_record.newest_store(tmp_path)
        if store is not None and alive(store.pid):
            os.kill(store.pid, signal.SIGKILL)
        network.close()


def test_partition_without_spare_neither_half_trains(apart: Callable[[int], tuple[Network, Cluster]]) -> None:
    network, run = apart(SLOTS)
    before = run.until(run.training, "the first start")[-1]
    network.cable("down")
    run.until(lambda: not any(alive(pid) for pids in run.workers().values() for pid in pids.values()), "all to stop")
    run.until(lambda: "may go on without" in run.log.read_text(), "the half that may not open a store to say so")
    assert run.training() == []
    network.cable("up")
    run.until(lambda: run.training() and run.training()[-1] > before, "all to train again")
    run.end()


def test_partition_only_half_with_spares_trains(apart: Callable[[int], tuple[Network, Cluster]]) -> None:
    network, run = apart(SLOTS + HALF)
    before = run.until(run.training, "the first start")[-1]
    network.cable("down")

    def half() -> list[set[str]]:
        return [
            owners for restart in run.training() if restart > before and len(owners := run.owners(restart)) == SLOTS
        ]

    run.until(lambda: {"n0", "n1", "n4", "n5"} in half(), "the half with the spares to train")
    run.until(lambda: len(run.training()) == 1, "the other half to stop")
    network.cable("up")
    run.until(run.training, "training after the partition has healed")
    run.end()


def cut_off_one(network: Network, run: Cluster, *, host: bool, seconds: float) -> float:
    """Cut off the node that hosts the store, or an owner that does not, and hold that for a while.

    Return how many seconds after that the others trained again.
    """
    before = run.until(run.training, "the first start")[-1]
    store = node_record.newest_store(run.folder)
    assert store is not None
    hosting = int(store.host.rpartition(".")[2]) - 1
    owners = sorted(int(name[1:]) for name in run.owners(before))
    cut = hosting if host else next(index for index in owners if index != hosting)
    began = time.monotonic()
    network.cut_off(cut)

    def replaced() -> list[int]:
        return [number for number in run.training() if number > before and f"n{cut}" not in run.owners(number)]

    after = run.until(replaced, "training without the node that is cut off")
    resumed = time.monotonic() - began
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert run.training() == after, f"interrupted again:\n{run.log.read_text()}"
        time.sleep(0.1)
    network.plug_in(cut)

    def back() -> bool:
        return any(one.node == f"n{cut}" and one.state == "spare" for one in node_record.read_all(run.folder))

    run.until(back, "the node to come back as a spare")
    assert run.training() == after
    restarts = {number for number in run.workers() if number > before}
    assert len(restarts) <= 2, restarts
    assert len(node_record.stores(run.folder)) == 1 + host
    run.end()
    return resumed


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep that many cores busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.parametrize("host", [False, True], ids=["owner", "host of the store"])
def test_one_node_cut_off_interrupts_others_once(apart: Callable[[int], tuple[Network, Cluster]], host: bool) -> None:
    cut_off_one(*apart(SLOTS + 1), host=host, seconds=15)


@pytest.mark.long
@pytest.mark.parametrize("host", [False, True], ids=["owner", "host of the store"])
def test_one_node_cut_off_for_long_under_load_interrupts_others_once(
    apart: Callable[[int], tuple[Network, Cluster]], host: bool
) -> None:
    network, run = apart(SLOTS + 1)
    with busy(len(os.sched_getaffinity(0))):
        resumed = cut_off_one(network, run, host=host, seconds=180)
    print(f"trained again {resumed:.1f} s after the cut")
    assert resumed < SILENCE + 10
