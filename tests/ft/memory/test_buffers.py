"""What snapshots take of a host: the arithmetic, and that agents take just that."""

from pathlib import Path

import pytest

from keepwarm.ft.memory.buffers import host_memory
from tests.support.ft.team import BUCKET, Team

MIB = 1 << 20


def test_host_memory_matches_hand_calculation() -> None:
    memory = host_memory(96 * MIB, members=6, parity=2, bucket_bytes=8 * MIB, durable=True, workers=4)
    assert (memory.data, memory.parity, memory.durable) == (192 * MIB, 96 * MIB, 104 * MIB)
    assert (memory.receiving, memory.decoding) == (5 * 8 * MIB, 6 * 8 * MIB)
    assert memory.reading == 4 * 2 * 8 * MIB
    assert memory.total == 544 * MIB
    alone = host_memory(90 * MIB, members=1, parity=1, bucket_bytes=8 * MIB, durable=False, workers=4)
    assert (alone.data, alone.total) == (192 * MIB, 192 * MIB)


@pytest.mark.parametrize(("members", "parity", "chunk"), [(4, 2, 3), (3, 1, 5), (1, 0, 2)])
def test_host_memory_equals_what_agents_allocate(tmp_path: Path, members: int, parity: int, chunk: int) -> None:
    world = Team(tmp_path, [(range(members), parity)], chunk=chunk)
    try:
        said = host_memory(
            chunk * (members - parity) * BUCKET, members=members, parity=parity, bucket_bytes=BUCKET, durable=False
        )
        world.recover(1)
        for step in range(1, 4):
            world.take(step)
        for agent in world.agents.values():
            assert agent.memory.bytes == said.data + said.parity
            assert agent.inbox.free * BUCKET <= said.receiving
    finally:
        world.close()
