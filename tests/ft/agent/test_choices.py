"""An epoch has one choice, whether the folder or votes made it stand, and two that met are not followed for long."""

from pathlib import Path

import msgspec
import pytest

from keepwarm.ft.agent import recovery_election, repair
from keepwarm.ft.discovery.registry import Registry
from keepwarm.ft.protocol.messages import Choice, Chosen, SnapshotId
from tests.support.ft.team import LAYOUT, Team, team


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "RETRY", 0.1)
    monkeypatch.setattr(recovery_election, "SETTLE_POLL_INTERVAL_S", 0.05)


def other_choice(world: Team, epoch: int) -> Choice:
    """Another choice of an epoch than agents would make: an older snapshot."""
    last = world.agents[0].election.choice
    assert last is not None
    decision = msgspec.structs.replace(last.decision, epoch=epoch, snapshot=SnapshotId("run", 1, 1, LAYOUT))
    return Choice(decision=decision)


def test_choice_that_a_minority_has_written_to_the_folder_stands_against_a_majority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do not see the file yet, as with a cache of the folder that is stale, until they write their own."""
    with team(tmp_path, 3, 1) as world:
        written = other_choice(world, 2)
        assert Registry(tmp_path / "shared").choose(written) == written
        for agent in world.agents.values():
            monkeypatch.setattr(agent.shared, "choice", lambda epoch, then: None)
        world.begin(2)
        world.until(lambda: world.agents[0].election.choice != world.agents[1].election.choice, "the first to choose")
        chosen = [agent.election.choice for agent in world.agents.values()]
        assert [each.decision.snapshot for each in chosen if each is not None and each.decision.epoch == 2] == [
            written.decision.snapshot
        ]


def test_agents_that_hear_of_two_choices_of_one_epoch_decide_in_the_next(tmp_path: Path) -> None:
    with team(tmp_path, 3, 1) as world:
        world.recover(2)
        world.agents[1].election.told(Chosen(choice=other_choice(world, 2)))
        world.until(lambda: world.recovered(3), "the next epoch")
        world.check(2)


def test_choice_stands_by_votes_after_the_folder_has_not_answered_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_election, "CLAIM_PATIENCE_S", 0.1)
    with team(tmp_path, 3, 1) as world:
        for agent in world.agents.values():
            monkeypatch.setattr(agent.shared, "choose", lambda choice, then: True)
        world.recover(2)
        world.check(2)
