"""Which agents an agent is connected with: all while an epoch is decided, and otherwise those that it needs."""

import time
from pathlib import Path

import msgspec
import pytest

from keepwarm.ft.transport.link import Link
from tests.support.ft.team import Team, team


def near(made: Team, slot: int) -> set[int]:
    state = made.agents[slot].state
    return {*state.group.members, *state.topology.neighbours(slot)} - {slot}


def test_links_of_an_epoch_are_closed_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.ft.transport.network.Network.LINGER", 0.5)
    made = Team(tmp_path, [(range(at, at + 3), 1) for at in range(0, 15, 3)])
    try:
        for epoch in (1, 2):
            made.recover(epoch)
            assert any(set(agent.network.links) > near(made, slot) for slot, agent in made.agents.items())
            made.until(
                lambda: all(set(agent.network.links) == near(made, slot) for slot, agent in made.agents.items()),
                "links to be closed",
            )
            made.take(epoch)
    finally:
        made.close()


@pytest.mark.parametrize("seconds", [-600, 600], ids=["behind", "ahead"])
def test_agent_that_wakes_up_yields_to_its_successor_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """An agent stands still, and another node, whose clock is wrong, takes its slot."""
    with team(tmp_path, 3, 1) as world:
        frozen = world.agents.pop(0)
        elsewhere = str(tmp_path / "elsewhere" / "0")
        world.configs[0] = msgspec.structs.replace(world.configs[0], folder=elsewhere)
        right = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: right() + seconds * 10**9)
        world.start(0)
        try:
            mine = world.agents[0].state.incarnation

            def links() -> dict[int, Link]:
                held = {slot: world.agents[slot].network.links.get(0) for slot in (1, 2)}
                return {s: link for s, link in held.items() if link and link.theirs and link.theirs.incarnation == mine}

            world.until(lambda: len(links()) == 2, "the successor's links", 30.0)
            before = links()
            world.agents[3] = frozen  # it wakes up
            world.until(lambda: frozen._ended, "the former agent to end", 30.0)
            assert "the slot has another agent" in frozen._ended
            assert not world.agents[0]._ended
            assert links() == before
            assert all(link.open for link in before.values())
        finally:
            world.agents.pop(3, None)
            frozen.close()
        world.recover(max(agent.state.epoch for agent in world.agents.values()) + 1)
        world.check(2)
