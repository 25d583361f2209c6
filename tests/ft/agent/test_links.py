"""Which agents an agent is connected with: all while an epoch is decided, and otherwise those that it needs."""

from pathlib import Path

import pytest

from tests.support.ft.team import Team


def near(team: Team, slot: int) -> set[int]:
    state = team.agents[slot].state
    return {*state.group.members, *state.topology.neighbours(slot)} - {slot}


def test_links_of_an_epoch_are_closed_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.ft.transport.network.Network.LINGER", 0.5)
    team = Team(tmp_path, [(range(at, at + 3), 1) for at in range(0, 15, 3)])
    try:
        for epoch in (1, 2):
            team.recover(epoch)
            assert any(set(agent.network.links) > near(team, slot) for slot, agent in team.agents.items())
            team.until(
                lambda: all(set(agent.network.links) == near(team, slot) for slot, agent in team.agents.items()),
                "links to be closed",
            )
            team.take(epoch)
    finally:
        team.close()
