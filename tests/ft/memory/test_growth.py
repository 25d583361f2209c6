"""Agents take their memory from the system while they already answer, and what is written meanwhile stays."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from keepwarm.ft.errors import AgentError
from keepwarm.ft.keeper import memory_file
from keepwarm.ft.memory import growth
from keepwarm.ft.memory.growth import Growth
from keepwarm.ft.memory.shared_memory import SharedBuffer
from keepwarm.launch.cli.snapshots import text
from tests.support.ft.nodes import BUCKET, nodes
from tests.support.ft.team import Team

SIZE = (48 << 20) + 12_288


def test_memory_is_taken_in_parts_and_what_is_written_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "PART_BYTES", 4 << 20)
    buffers = [SharedBuffer.of(memory_file("test"), SIZE) for _ in range(3)]
    rng = np.random.default_rng(0)
    written = [np.sort(rng.choice(SIZE, 20_000, replace=False)) for _ in buffers]
    taking = Growth(buffers)
    for buffer, places in zip(buffers, written, strict=True):
        for part in np.array_split(places, 200):
            buffer.data[part] = 7
    while taking.bytes < 3 * SIZE:
        assert taking.failure is None
    taking.close()
    for buffer, places in zip(buffers, written, strict=True):
        assert os.fstat(buffer.descriptor).st_blocks * 512 >= SIZE
        assert int((buffer.data == 7).sum()) == len(places)
        assert (buffer.data[places] == 7).all()
        buffer.close()


def test_agent_answers_and_commits_before_it_has_all_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, take = threading.Event(), SharedBuffer.take

    def slow(buffer: SharedBuffer, start: int, stop: int) -> None:
        gate.wait(60)
        take(buffer, start, stop)

    monkeypatch.setattr(SharedBuffer, "take", slow)
    team = Team(tmp_path, [((0, 1, 2), 1)])
    try:
        team.until(team.connected, "all links")
        team.recover(1)
        team.take(1)
        assert {agent.memory.growth.bytes for agent in team.agents.values()} == {0}
        gate.set()
        team.until(
            lambda: all(agent.memory.growth.bytes == agent.memory.bytes for agent in team.agents.values()), "memory"
        )
        team.check_committed(1)
    finally:
        gate.set()
        team.close()


def test_status_tells_how_much_memory_an_agent_has_taken(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, state_bytes=64 * BUCKET) as world:
        client = world.connect(0)
        client.wait_until_grown(60.0)
        status = client.status()
        assert status.grown_bytes == status.memory_bytes > 0
        half = type(status)(**{name: getattr(status, name) for name in status.__struct_fields__} | {"grown_bytes": 0})
        assert any("joining, growing 0 %" in line for line in text([half], {}))
        assert not any("growing" in line for line in text([status], {}))
        monkeypatched = client.status

        def growing(deadline: float | None = None) -> object:
            monkeypatched(deadline)
            return half

        client.status = growing  # type: ignore[method-assign,assignment]
        with pytest.raises(AgentError, match="to take its memory, it has 0 of"):
            client.wait_until_grown(0.0)
