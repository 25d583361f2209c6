"""Stores and supervisors that are killed, frozen and woken in drawn orders: the run always goes on with all nodes."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from keepwarm.launch.node import record as node_record
from keepwarm.trainer.monitor import events
from tests.launch.node.test_supervision import Cluster
from tests.support.runs.stand_ins import WORKER

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SLOTS, SPARES, ROUNDS = 3, 2, 12


class Drawn:
    """Rounds of faults. A majority of the owners is never frozen: the others would rightly wait for it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random, self.folder = random.Random(seed), folder
        self.run = Cluster(folder, SPARES, 1.0, WORKER, slots=SLOTS)
        self.told: list[str] = []

    def newest(self) -> int:
        return max((int(path.name.split("-")[2]) for path in self.folder.glob("ran-*")), default=-1)

    def settled(self) -> bool:
        """Whether every node has its place, and all workers of the newest restart run."""
        records, restart = node_record.read_all(self.folder), self.newest()
        states = sorted(record.state for record in records)
        return (
            states == ["running"] * SLOTS + ["spare"] * SPARES
            and all(record.restart == restart for record in records if record.state == "running")
            and all((self.folder / f"ran-{rank}-{restart}").exists() for rank in range(SLOTS))
        )

    def signal(self, pids: Iterable[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # a store may have been killed already
                os.kill(pid, number)

    def strike(self, frozen: dict[str, list[int]]) -> None:
        """Freeze a node, perhaps with the store that it has opened, or kill the store."""
        store, records = node_record.newest_store(self.folder), node_record.read_all(self.folder)
        assert store is not None
        if self.random.random() < 0.3:
            self.told.append(f"store {store.number} killed")
            self.signal([store.pid], signal.SIGKILL)
            return
        owner_frozen = any(record.slot is not None for record in records if record.node in frozen)
        free = [one for one in records if one.node not in frozen and not (owner_frozen and one.slot is not None)]
        if not free:
            return
        node = self.random.choice(free)
        opened = [event.node for event in events.read(self.folder).of(events.Failure) if event.kind == "store"]
        with_store = opened[-1:] == [node.node] and self.random.random() < 0.7
        self.told.append(f"{node.node} frozen" + f" with store {store.number}" * with_store)
        frozen[node.node] = [*([store.pid] if with_store else []), node.supervisor, *node.workers.values()]
        self.signal(frozen[node.node], signal.SIGSTOP)

    def round(self) -> None:
        frozen: dict[str, list[int]] = {}
        for _ in range(self.random.randint(1, 3)):
            self.strike(frozen)
            time.sleep(self.random.choice([0, 0.3, 1, 2]))
        time.sleep(self.random.choice([0.5, 2, 4, 8]))
        for node in self.random.sample(sorted(frozen), len(frozen)):
            self.told.append(f"{node} woken")
            self.signal(frozen[node], signal.SIGCONT)
            time.sleep(self.random.choice([0, 1.5]))
        self.run.until(self.settled, f"all nodes after {', '.join(self.told)}")


@pytest.fixture(params=range(4))
def drawn(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Drawn]:
    faults = Drawn(tmp_path, request.param)
    yield faults
    faults.run.kill()


def test_drawn_faults_of_supervisors_and_stores_leave_every_node_with_its_place(drawn: Drawn) -> None:
    drawn.run.until(drawn.settled, "all nodes")
    for _ in range(ROUNDS):
        drawn.round()
    drawn.run.end(3)
