"""Agents choose, and find each other, without any file of the shared folder."""

from pathlib import Path

import pytest

from keepwarm.ft.protocol.ballot import ABSTAINS, Ballot, Promises, digest_of
from keepwarm.ft.protocol.messages import Choice, Decision, SnapshotId
from keepwarm.ft.worker import client
from tests.support.faulty.io_faults import Fault, library
from tests.support.ft.nodes import Nodes, random_state, together

NOW = (10, 10, 10, 10)
"""Incarnations of the slots."""


def choice(step: int, epoch: int = 2, named: tuple[int, ...] = NOW[:3]) -> Choice:
    snapshot = SnapshotId("run", 1, step, "layout")
    return Choice(decision=Decision(epoch=epoch, snapshot=snapshot, incarnations=named))


def ballot(slot: int, slots: int = 3, epoch: int = 2, *, new: bool = False, incarnation: int = 10) -> Ballot:
    made = Ballot(slot, slots, incarnation, Promises())
    made.begin(epoch, new=new)
    return made


def stands(voters: list[Ballot], proposed: Choice) -> bool:
    """Whether a choice stands by what all of these vote."""
    votes = [(slot, voter.vote(proposed)) for slot, voter in enumerate(voters)]
    return [voters[0].count(slot, vote) for slot, vote in votes][-1] == proposed


def test_choice_stands_with_the_votes_of_a_majority() -> None:
    chooser, voter = ballot(0), ballot(1)
    proposed = chooser.propose(choice(5))
    assert chooser.count(0, chooser.vote(proposed)) is None
    assert chooser.count(1, voter.vote(proposed)) == choice(5)


def test_slot_votes_once_in_an_epoch_and_proposes_what_it_voted_for() -> None:
    first, second, voter = ballot(0), ballot(1), ballot(2)
    voter.vote(first.propose(choice(5)))
    assert voter.vote(second.propose(choice(6))).digest == digest_of(choice(5))
    assert voter.propose(choice(6)) == choice(5)
    assert second.count(2, voter.vote(choice(6))) is None
    voter.begin(3, new=False)
    assert voter.vote(choice(6, 3)).digest == digest_of(choice(6, 3))


def test_next_agent_with_the_same_memory_keeps_the_vote() -> None:
    voter = ballot(0)
    cast = voter.vote(choice(5))
    again = Ballot(0, 3, 11, voter.promises)
    again.begin(2, new=False)
    assert again.vote(choice(6)) == cast


def test_votes_for_different_choices_and_of_another_epoch_are_no_majority() -> None:
    proposed = [choice(step, named=NOW) for step in (5, 5, 6)]
    votes = [ballot(slot, 4).vote(each) for slot, each in enumerate(proposed)]
    votes.append(ballot(3, 4, 3).vote(choice(5, 3, NOW)))
    chooser = ballot(0, 4)
    chooser.vote(choice(5, named=NOW))
    chooser.vote(choice(6, named=NOW))
    assert [chooser.count(slot, vote) for slot, vote in enumerate(votes)] == [None] * 4


def test_agent_that_may_have_forgotten_a_vote_makes_no_second_choice_stand() -> None:
    """Slots 0 and 1 have chosen step 5; slot 1 loses its memory and meets slot 2, which has heard of nothing."""
    cut_off = [ballot(0), ballot(1)]
    assert stands(cut_off, choice(5))
    forgetful, named = ballot(1, new=True, incarnation=11), (0, 11, 10)
    chooser = ballot(2)
    for slot, voter in ((1, forgetful), (2, chooser)):
        assert chooser.count(slot, voter.vote(chooser.propose(choice(6, named=named)))) is None
    assert chooser.too_few({1, 2})


@pytest.mark.parametrize(("slots", "lost"), [(2, 1), (4, 2), (5, 2), (3, 3)])
def test_choice_stands_without_a_file_although_half_of_the_slots_or_all_are_new(slots: int, lost: int) -> None:
    named = (11,) * lost + (10,) * (slots - lost)
    voters = [
        ballot(slot, slots, new=slot < lost, incarnation=incarnation) for slot, incarnation in enumerate(named)
    ]  # fmt: skip
    assert stands(voters, choice(5, named=named))


def test_new_agent_does_not_vote_for_a_choice_that_names_the_one_before_it() -> None:
    chooser, voter = ballot(0, 2), ballot(1, 2, new=True, incarnation=11)
    for slot, each in enumerate((chooser, voter)):
        chooser.count(slot, each.vote(chooser.propose(choice(5, named=(10, 10)))))
    assert chooser.hopeless({0, 1})
    voter.begin(3, new=True)
    assert voter.vote(choice(5, 3, (10, 11))).digest == digest_of(choice(5, 3, (10, 11)))


def test_slot_does_not_vote_for_a_choice_that_names_an_agent_that_it_knows_to_be_replaced() -> None:
    voter = ballot(0)
    voter.follow(choice(5, 2, (10, 11, 10)))
    again = Ballot(0, 3, 12, voter.promises)
    again.begin(3, new=False)
    assert again.vote(choice(6, 3, (12, 10, 10))).digest == ABSTAINS
    assert again.vote(choice(6, 3, (12, 11, 0))).digest == digest_of(choice(6, 3, (12, 11, 0)))


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
