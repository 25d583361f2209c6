"""Real agent processes: snapshots are committed, survive their workers, come back to the bit, and leave nothing."""

import json
from pathlib import Path

import pytest

from ft.messages import SnapshotId
from tests.support.ft_nodes import Nodes, equal, nodes, random_state, together


def settle(world: Nodes, snapshotters: list, epoch: int) -> list:
    return together(lambda s: s.restore(epoch), snapshotters)


def take(snapshotters: list, step: int) -> None:
    for snapshotter in snapshotters:
        snapshotter.offer(step, f"meta {step} {snapshotter.rank}".encode())
    for snapshotter in snapshotters:
        snapshotter.join()
        assert snapshotter.failure is None
    for snapshotter in snapshotters:
        snapshotter.client.wait_committed(snapshotter.sealed, 30.0)


def test_one_node_commits_and_restores(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, workers=2) as world:
        states = [random_state(rank, 2) for rank in range(2)]
        snapshotters = world.snapshotters(states)
        assert settle(world, snapshotters, 1) == ["no agent holds a snapshot in memory"] * 2
        take(snapshotters, 5)
        for rank, state in enumerate(states):
            for tensor in state.values():
                tensor.local.zero_()
        for each in world.clients:
            each.close()
        fresh = [random_state(rank, 2, seed=9) for rank in range(2)]
        restored = settle(world, world.snapshotters(fresh), 2)
        assert [(r.step, r.meta) for r in restored] == [(5, b"meta 5 0"), (5, b"meta 5 1")]
        assert all(equal(a, random_state(rank, 2)) for rank, a in enumerate(fresh))


@pytest.mark.parametrize(("count", "parity"), [(2, 1), (3, 1), (4, 2)])
def test_lost_agents_are_rebuilt_from_their_group(tmp_path: Path, count: int, parity: int) -> None:
    with nodes(tmp_path, count, groups=[(range(count), parity)]) as world:
        states = [random_state(rank, count) for rank in range(count)]
        snapshotters = world.snapshotters(states)
        settle(world, snapshotters, 1)
        for step in (5, 6, 7):
            take(snapshotters, step)
        for each in world.clients:
            each.close()
        for slot in range(parity):
            world.kill(slot)
            world.start(slot)
        fresh = [random_state(rank, count, seed=9) for rank in range(count)]
        restored = settle(world, world.snapshotters(fresh), 2)
        assert [(r.step, r.meta) for r in restored] == [(7, f"meta 7 {rank}".encode()) for rank in range(count)]
        assert all(equal(state, random_state(rank, count)) for rank, state in enumerate(fresh))
