"""The oracle against short orders of events, where what is promised can be told by hand."""

import pytest

from tests.model_checker.healing import Healing
from tests.model_checker.history import begin
from tests.model_checker.mutants import MINORITY
from tests.model_checker.setting import Setting, Shape
from tests.model_checker.simulated.world import World
from tests.model_checker.truth import Violation


def world_of_late_slot() -> World:
    """Return four slots with 1.1 committed, two rotten chunks of a stripe, and an epoch in which all but 1 answer 3."""
    world = begin(Setting(0, Shape((4,), 2)))
    world.trainer.limit = 1
    Healing(world).settle()
    assert world.truth.newest == (1, 1)
    for move in (
        ("rot", 0, 0, 0), ("rot", 2, 0, 0), ("advance", 3), ("deliver", 3, 0, 64), ("deliver", 3, 2, 64),
        ("verify", 0), ("verify", 2), ("verify", 3), ("deliver", 0, 3, 64), ("deliver", 2, 3, 64),
    ):  # fmt: skip
        assert world.do(move), move
    return world


@pytest.mark.parametrize("order", [("kill", "late"), ("late", "kill")], ids="-".join)
def test_member_that_answered_counts_if_it_dies_unnoticed_just_before_or_after_the_choice(order: list[str]) -> None:
    world = world_of_late_slot()
    for name in order:
        assert world.do((name, 0 if name == "kill" else 3))
    assert world.chosen[2] is None
    assert world.truth.newest is None


def test_member_that_answered_and_is_known_to_be_dead_does_not_count() -> None:
    world = world_of_late_slot()
    assert world.do(("kill", 0))
    assert world.do(("notice", 3, 0))
    assert not world.do(("late", 3))
    with MINORITY.planted(), pytest.raises(Violation, match="I7"):
        world.do(("late", 3))


def test_new_agent_of_a_member_that_answered_does_not_count_before_it_answers() -> None:
    world = world_of_late_slot()
    assert world.do(("kill", 0))
    assert world.do(("start", 0))
    assert world.do(("up", 0, 3))
    assert not world.do(("late", 3))
    with MINORITY.planted(), pytest.raises(Violation, match="I7"):
        world.do(("late", 3))
