"""A rank whose agent dies goes on with the next one, by itself and without waiting."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from keepwarm.ft.spec import SnapshotSpec
from keepwarm.ft.worker.in_memory import Deployment, InMemoryCheckpointer
from tests.support.ft.nodes import Tensor


def until(done: Callable[[], bool], deadline: float = 60.0) -> None:
    end = time.monotonic() + deadline
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


class Rank:
    """The only rank of a job, which completes a step now and then."""

    def __init__(self, folder: Path) -> None:
        weights = torch.zeros(10_000)
        shard = Tensor("w", (10_000,), (0,), (10_000,), weights, (0,))
        place = Deployment(folder=folder, layout="one rank", ranks_per_node=1)
        spec = SnapshotSpec(every=1_000_000, bucket=4096)
        self.weights, self.step = weights, 0
        self.memory = InMemoryCheckpointer(spec, {"w": shard}, place)
        self.memory.begin_epoch()

    def train(self) -> bool:
        """Complete a step as the loop does. Return whether a snapshot was taken before it was due."""
        self.memory.join()
        self.weights += 1
        self.step += 1
        self.memory.maybe_snapshot(self.step, lambda: b"small", step_seconds=0.1)
        return self.memory.exposed(self.step) and self.memory.protect(self.step, lambda: b"small")

    def committed(self) -> int:
        age = self.memory._client.status().committed if not self.memory._client.gone else None
        return -1 if age is None else age[1]

    def addresses(self) -> list[int]:
        return [buffer.data.ctypes.data for buffer in self.memory._client.buffers]

    def lose(self, who: str) -> None:
        os.kill(getattr(self.memory._client.status(), who), signal.SIGKILL)
        until(lambda: self.memory._client.gone)

    def attached(self) -> bool:
        self.train()
        return not self.memory._client.gone


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    runtime = tempfile.mkdtemp(prefix="kw-")  # short, as the paths of sockets must be
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    made = Rank(tmp_path)
    try:
        made.train()
        until(lambda: made.committed() == 1)
        yield made
    finally:
        made.memory.close(finished=True)
        shutil.rmtree(runtime, ignore_errors=True)


def test_rank_whose_agent_died_attaches_after_the_next_step_and_keeps_its_mappings(rank: Rank) -> None:
    before = rank.addresses()
    rank.lose("pid")
    until(rank.attached)
    assert rank.addresses() == before
    assert rank.committed() == 1
    assert not rank.memory._client.exposed


def test_rank_whose_keeper_died_takes_a_snapshot_long_before_it_is_due(rank: Rank) -> None:
    rank.lose("keeper")
    until(lambda: rank.train() or rank.committed() > 1)
    until(lambda: rank.committed() > 1 or (rank.train() and False))
    assert 1 < rank.committed() <= rank.step
    assert not rank.memory._client.exposed


def test_rank_that_cannot_write_what_an_agent_needs_trains_on_and_tries_again(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(rank.memory._config.folder)
    rank.lose("keeper")
    shutil.rmtree(place)
    place.write_text("not a folder")
    rank.memory._next = 0
    rank.train()
    assert rank.memory.last_error
    place.unlink()
    until(lambda: rank.train() or rank.committed() > 1)


def test_rank_restores_in_a_later_epoch_although_what_was_chosen_was_deleted(rank: Rank, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "agents")
    found = rank.memory.restore()
    assert not isinstance(found, str), found
    assert (found.epoch, found.step, rank.memory.epoch) == (1, 1, 2)
