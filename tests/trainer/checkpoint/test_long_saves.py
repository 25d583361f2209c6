"""Saving may take longer than a collective's deadline: ranks wait for each other outside of collectives."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, Store
from torch.distributed import DistStoreError

from keepwarm.ft.format import publication, writer
from keepwarm.ft.format.manifest import Part
from keepwarm.trainer.checkpoint import own_part
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.distributed import meeting
from keepwarm.trainer.distributed.meeting import Meeting
from keepwarm.trainer.distributed.world import COLLECTIVE_TIMEOUT, World
from keepwarm.trainer.errors import StateNotSaved
from keepwarm.trainer.job.sections import CheckpointSpec
from tests.support.ranks import run_ranks
from tests.trainer.checkpoint.test_checkpoint import shard

TERA = 1e12
RANKS = 1024


class ModelledStore:
    """A store in which a wait takes the seconds of a model: meanwhile `meanwhile(now)` lets the other ranks work."""

    def __init__(self) -> None:
        self.now = 0.0
        self.values: dict[str, int] = {}
        self.meanwhile: Callable[[], object] = lambda: None

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def set(self, key: str, _: str) -> None:
        self.values[key] = 1

    def get(self, key: str) -> bytes:
        return str(self.values[key]).encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        if not self.check(keys):
            self.now += timeout.total_seconds()
            self.meanwhile()
        if not self.check(keys):
            raise DistStoreError("timed out")

    def meeting(self) -> Meeting:
        return Meeting(store=cast(Store, self), name="m", size=RANKS, stall=COLLECTIVE_TIMEOUT, clock=lambda: self.now)


class Storage:
    """Shared storage that gives each of the ranks but the first its share of a bandwidth; some may stop."""

    def __init__(self, store: ModelledStore, state: float, bandwidth: float, stops_after: float = float("inf")) -> None:
        self._store = store
        self._meeting = store.meeting()
        # Written once, read once.
        self.seconds = 2 * state / bandwidth
        self._stops_after = stops_after
        self._arrived = False
        store.meanwhile = self._work

    def _work(self) -> None:
        if self._store.now < min(self.seconds, self._stops_after):
            self._meeting.advance()
        elif self._store.now >= self.seconds and not self._arrived:
            self._arrived = True
            if self._store.add("m/arrived", RANKS - 1) == RANKS:
                self._store.set("m/all", "")


def test_save_of_5_tb_on_128_nodes_takes_longer_than_a_collective_may_wait() -> None:
    """405B parameters, 12 bytes each, at 5 GB/s for all nodes. Rank 0 has no bytes of its own and waits."""
    store = ModelledStore()
    storage = Storage(store, 5 * TERA, 5e9)
    assert storage.seconds > 3 * COLLECTIVE_TIMEOUT.total_seconds()
    assert store.meeting().arrive()
    assert store.now == pytest.approx(storage.seconds, abs=2)


def test_save_that_stops_moving_is_given_up_after_the_deadline() -> None:
    store = ModelledStore()
    Storage(store, 5 * TERA, 5e9, stops_after=900.0)
    assert not store.meeting().arrive()
    assert store.now == pytest.approx(900 + COLLECTIVE_TIMEOUT.total_seconds(), abs=5)


def test_arrive_progress_of_others_is_reported() -> None:
    """The watchdog of a rank that waits must know that others go on."""
    store, moved = ModelledStore(), []
    Storage(store, 5 * TERA, 50e9)
    waiting = store.meeting()
    waiting.moved = lambda: moved.append(store.now)
    assert waiting.arrive()
    assert len(moved) > 100


def test_arrive_is_ended_by_an_interruption() -> None:
    stopped = threading.Event()
    stopped.set()
    waiting = Meeting(store=HashStore(), name="m", size=2, stall=COLLECTIVE_TIMEOUT, stopped=stopped)
    with pytest.raises(RuntimeError, match="stopped while 1 ranks"):
        waiting.arrive()


def test_arrive_all_ranks_meet_in_a_real_store() -> None:
    store = HashStore()
    meetings = [Meeting(store=store, name="m", size=4, stall=COLLECTIVE_TIMEOUT) for _ in range(4)]
    for one in meetings:
        one.advance()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(Meeting.arrive, meetings)) == [True] * 4


def save_recorded(folder: Path) -> tuple[list[str], list[str]]:
    """Save one row of each rank. Return the parts that this rank reads whole, and what it does in which order."""
    rank = dist.get_rank()
    read: list[str] = []
    order: list[str] = []
    verify, arrive = own_part._verify, Meeting.arrive

    def recorded(directory: Path, part: Part, advance: Callable[[], object]) -> None:
        read.append(part.file)
        order.append("read")
        verify(directory, part, advance)

    def arrived(self: Meeting) -> bool:
        order.append("arrive")
        return arrive(self)

    class Recorded(World):
        def any(self, flag: bool) -> bool:
            order.append("collective")
            return super().any(flag)

    own_part._verify, Meeting.arrive = recorded, arrived  # type: ignore[method-assign, assignment]
    try:
        store = FileStore(str(folder / "store"), 2)
        world = Recorded(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"), store=store)
        row = replace(shard("w", torch.full((2, 3), float(rank)), slice(rank, rank + 1), slice(0, 3)), replicas=(rank,))
        saver = Checkpoints(folder / "checkpoints", CheckpointSpec(), world, run="tiny", layout="l")
        publication.verify(saver.save(1, {"w": row}, {}))
    finally:
        own_part._verify, Meeting.arrive = verify, arrive  # type: ignore[method-assign]
    return read, order


@pytest.mark.dist
def test_save_every_rank_reads_its_own_part_before_any_collective(tmp_path: Path) -> None:
    for rank, (read, order) in enumerate(run_ranks(2, save_recorded, tmp_path)):
        assert read == [f"rank_{rank:05d}.safetensors"]
        assert order == ["read", "arrive", "collective", "arrive", "collective"]


def test_save_file_changed_after_writing_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault itself: a bit of the file is another one than was written."""
    write = writer.write_part_blocks

    def faulty(*arguments: Any, **more: Any) -> Part:
        part = write(*arguments, **more)
        with (arguments[0] / part.file).open("r+b") as file:
            file.seek(part.header_bytes)
            file.write(b"\xff")
        return part

    monkeypatch.setattr(own_part, "write_part_blocks", faulty)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    saver = Checkpoints(tmp_path, CheckpointSpec(), world, run="tiny", layout="l")
    with pytest.raises(StateNotSaved, match=r"rank_00000\.safetensors: w has checksum"):
        saver.save(1, {"w": shard("w", torch.ones(4, 4), slice(None), slice(None))}, {})
    assert saver.latest() is None


def test_advance_reports_at_most_once_a_second() -> None:
    store = HashStore()
    moments = iter([10.0, 10.0, 10.5, 11.1, 11.1])
    at_work = Meeting(store=store, name="m", size=2, stall=COLLECTIVE_TIMEOUT, clock=lambda: next(moments))
    for _ in range(3):
        at_work.advance()
    assert int(store.get("m/moved")) == 2
    assert meeting.REPORT_EVERY_S == 1.0
