"""Agents choose, and find each other, without any file of the shared folder."""

from pathlib import Path

import pytest

from keepwarm.ft.protocol.ballot import Ballot, digest_of
from keepwarm.ft.protocol.messages import Choice, Decision, SnapshotId
from keepwarm.ft.worker import client
from tests.support.faulty.io_faults import Fault, library
from tests.support.ft.nodes import Nodes, random_state, together


def choice(step: int, epoch: int = 2) -> Choice:
    snapshot = SnapshotId("run", 1, step, "layout")
    return Choice(decision=Decision(epoch=epoch, snapshot=snapshot, incarnations=(1, 1, 1)))


def ballot(slots: int = 3, epoch: int = 2) -> Ballot:
    made = Ballot(slots, None)
    made.begin(epoch)
    return made


def test_choice_stands_with_the_votes_of_a_majority() -> None:
    chooser, voter = ballot(), ballot()
    proposed = chooser.propose(choice(5))
    assert chooser.cast is not None
    assert chooser.count(0, chooser.cast) is None
    assert chooser.count(1, voter.vote(proposed)) == choice(5)


def test_slot_votes_once_in_an_epoch_and_proposes_what_it_voted_for() -> None:
    first, second, voter = ballot(), ballot(), ballot()
    voter.vote(first.propose(choice(5)))
    assert voter.vote(second.propose(choice(6))).digest == digest_of(choice(5))
    assert voter.propose(choice(6)) == choice(5)
    assert second.count(1, voter.vote(choice(6))) is None
    voter.begin(3)
    assert voter.vote(choice(6, 3)).digest == digest_of(choice(6, 3))


def test_next_agent_with_the_same_memory_keeps_the_vote() -> None:
    voter = ballot()
    cast = voter.vote(choice(5))
    again = Ballot(3, cast)
    again.begin(2)
    assert again.vote(choice(6)) == cast


def test_votes_for_different_choices_and_of_another_epoch_are_no_majority() -> None:
    chooser = ballot(4)
    votes = [ballot(4).vote(choice(step)) for step in (5, 5, 6)] + [ballot(4, 3).vote(choice(5, 3))]
    chooser.vote(choice(5))
    chooser.vote(choice(6))
    assert [chooser.count(slot, vote) for slot, vote in enumerate(votes)] == [None] * 4


def test_new_agent_is_started_found_and_filled_while_the_folder_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the secret is not to be read: those that start an agent hand it over."""
    hold = tmp_path / "hold"
    calls = "open,write,sync,rename,mkdir,read,stat"
    fault = Fault(path=f"{tmp_path}/@(shared*|secret)", kind="hang", calls=calls, hold=hold)
    with monkeypatch.context() as environment:
        for name, value in (fault.environment(tmp_path / "struck") | {"LD_PRELOAD": str(library())}).items():
            environment.setenv(name, value)
        world = Nodes(tmp_path, 3, groups=[((0, 1, 2), 1)])
        world.start_all()
        try:
            world.commit([random_state(rank, 3) for rank in range(3)], 5)
            hold.touch()
            world.kill(1)
            client.ensure_agent(world.configs[1], 120.0, secret=world.secret)
            world.look(1)
            fresh = world.snapshotters([random_state(rank, 3, seed=9) for rank in range(3)])
            attached = [each.client.attached for each in fresh]
            known = {slot: one.address for slot, one in enumerate(attached) if one is not None}
            for each in fresh:
                each.client.introduce(known)
            restored = together(lambda each: each.restore(2), fresh)
            assert [each.step for each in restored] == [5, 5, 5]
            assert hold.exists()
        finally:
            hold.unlink(missing_ok=True)
            world.close()
