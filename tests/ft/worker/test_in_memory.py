"""Snapshots of a trainer, with real agents: what ranks agree on, and what is not worth a collective."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from keepwarm.ft.errors import AgentError, FtError
from keepwarm.ft.spec import SnapshotSpec
from keepwarm.ft.worker import client
from keepwarm.ft.worker.in_memory import Deployment, InMemoryCheckpointer
from keepwarm.ft.worker.snapshotter import Snapshotter
from tests.support.ft.nodes import Tensor
from tests.support.ranks import run_ranks


@pytest.fixture(autouse=True)
def _no_agent_stays() -> Iterator[None]:
    yield
    for child in client._children:
        child.kill()  # the keeper, and its agent with it
        child.wait(30.0)


def checkpointer_of(folder: Path, **spec: Any) -> InMemoryCheckpointer:
    rank = dist.get_rank() if dist.is_initialized() else 0
    weights = torch.full((2000,), float(rank))
    state = {"w": Tensor("w", (4000,), (2000 * rank,), (2000,), weights, (rank,))}
    place = Deployment(folder=folder, layout="layout", ranks_per_node=1)
    made = InMemoryCheckpointer(SnapshotSpec(bucket=4096, scrub=None, lease=20.0, **spec), state, place)
    made.begin_epoch()
    return made


def collectives_of_steps(folder: str, travels: bool) -> tuple[list[int], int]:
    """Return the number of collectives of `ft` in each step, and that of snapshots taken."""
    checkpointer = checkpointer_of(Path(folder), every="auto")
    reduce, calls, counts = dist.all_reduce, [0], []

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return reduce(*args, **options)

    with mock.patch.object(dist, "all_reduce", counted):
        for step in range(1, 6):
            checkpointer.join()
            before = calls[0]
            checkpointer.maybe_snapshot(step, lambda: b"small", 1.0)
            counts.append(calls[0] - before)
            if travels:
                numbers = torch.tensor(checkpointer.votes())
                reduce(numbers, op=dist.ReduceOp.MAX)
                checkpointer.agreed(numbers.tolist())
    checkpointer.close(finished=True)
    return counts, int(checkpointer.timings()["taken"])


@pytest.mark.dist
@pytest.mark.parametrize("travels", [True, False])
def test_in_memory_votes_that_travel_leave_steps_without_a_collective(tmp_path: Path, travels: bool) -> None:
    for counts, taken in run_ranks(2, collectives_of_steps, str(tmp_path), travels, deadline=120.0):
        assert taken >= 2
        assert counts[0] == 0  # nothing has been measured, and no agent has died
        assert any(counts[1:]) != travels


def test_in_memory_vote_tells_that_the_agent_has_died(tmp_path: Path) -> None:
    checkpointer = checkpointer_of(tmp_path, every=1)
    checkpointer.maybe_snapshot(1, lambda: b"small", 1.0)
    checkpointer.join()
    os.kill(checkpointer._client.status().pid, signal.SIGKILL)
    end = time.monotonic() + 60.0
    while not checkpointer.votes()[0]:
        assert time.monotonic() < end
        time.sleep(0.01)
    for step in itertools.count(2):
        checkpointer.agreed(checkpointer.votes())
        checkpointer.maybe_snapshot(step, lambda: b"small", 1.0)
        checkpointer.join()
        if checkpointer.last_error is None:
            break
        assert "deciding what to restore: offer the next step again" in checkpointer.last_error
        assert time.monotonic() < end
        time.sleep(0.01)
    assert checkpointer.votes()[0] == 0
    checkpointer.close(finished=True)


def test_in_memory_check_of_restored_data_that_breaks_is_not_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = checkpointer_of(tmp_path, every=1)
    assert checkpointer.commit_now(1, lambda: b"small") is None

    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Snapshotter, "_threads", broken, raising=True)
    checkpointer._snapshotter._check_after(None, [])  # type: ignore[arg-type]
    with pytest.raises(FtError, match="restored memory could not be verified: MemoryError"):
        checkpointer.join()
    checkpointer.abandon()


def test_in_memory_buffers_that_cannot_be_mapped_are_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, size: int) -> None:
        os.close(descriptor)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(client, "SharedBuffer", refuse)
    with pytest.raises(AgentError, match="Cannot allocate memory"):
        checkpointer_of(tmp_path, every=1)
