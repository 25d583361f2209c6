"""Histories of the snapshot protocol against the promises of `docs/promises.md`."""

import pytest

from tests.model_checker import exploring, history, setting, shrinking
from tests.model_checker.port import StripeGroup
from tests.model_checker.setting import SHAPES, drawn
from tests.model_checker.simulated import content

SECONDS = 20
"""What the ordinary suite spends, whatever the machine."""


def test_histories_of_a_slice_keep_every_promise() -> None:
    report = exploring.explore(range(100_000), seconds=SECONDS)
    print(report)
    assert not report.broken, exploring.explained(report)


@pytest.mark.long
@pytest.mark.timeout(14_400)
def test_twenty_thousand_histories_keep_every_promise() -> None:
    report = exploring.explore(range(20_000), processes=2)
    print(report)
    assert report.histories == 20_000
    assert not report.broken, exploring.explained(report)


def test_settings_of_many_seeds_cover_shapes_and_faults() -> None:
    settings = [drawn(seed) for seed in range(300)]
    assert {each.shape for each in settings} == set(SHAPES)
    assert {fault for each in settings for fault in each.faults} == setting.FAULTS.keys()
    assert {each.wait for each in settings} == {each.warm for each in settings} == {True, False}
    assert {(each.workers, each.chunk, each.short) for each in settings} >= {(1, 1, 0), (2, 1, 0), (2, 2, 1)}


@pytest.mark.parametrize("seed", [0, 4, 11])
def test_history_of_one_seed_is_the_same_twice_and_when_replayed(seed: int) -> None:
    first, second = history.run(seed, 150), history.run(seed, 150)
    assert first == second
    again = history.replay(first.setting, first.moves)
    assert (again.promise, again.text, again.commits) == (first.promise, first.text, first.commits)


def test_ranks_that_restored_different_epochs_restore_again() -> None:
    """One rank restores nothing in an epoch, the others a snapshot in the next, which has begun at all by then."""
    outcome = history.run(19_308)
    assert not outcome.promise, outcome.text


def test_every_move_that_is_drawn_has_a_sentence() -> None:
    names = {move[0] for seed in range(24) for move in history.run(seed, 200).moves}
    assert names - shrinking.SENTENCES.keys() == set()
    assert len(names) > 15


def test_shrinking_leaves_only_the_moves_that_are_needed() -> None:
    moves = [("act", number, 0) for number in range(50)]
    needed = {7, 31, 32}

    def breaks(rest: list[tuple[object, ...]]) -> bool:
        return needed <= {move[1] for move in rest}

    assert [move[1] for move in shrinking.shrunk(moves, breaks)] == sorted(needed)


# ---- symbolic bytes


def chunks(group: StripeGroup, stripe: int) -> dict[int, content.Chunk]:
    """Return the right chunk of one bucket on every member."""
    data = {slot: content.written((1, 1), slot, 0) for slot in group.sources(stripe)}
    parity = frozenset(data.items())
    return {slot: [data.get(slot, parity)] for slot in group.members}


def test_decode_from_any_k_chunks_gives_what_was_written() -> None:
    group = StripeGroup(0, (0, 1, 2, 3), 2)
    right = chunks(group, 1)
    for one in group.members:
        for other in set(group.members) - {one}:
            present = {slot: right[slot] for slot in (one, other)}
            assert content.decode(group, 1, present, group.members, 1) == right


def test_decode_from_chunks_that_do_not_belong_together_gives_garbage() -> None:
    group = StripeGroup(0, (0, 1, 2), 1)
    right = chunks(group, 0)
    parity, (first, second) = group.parities(0)[0], group.sources(0)
    wrong = {first: right[first], parity: [content.flipped(right[parity][0], 1)]}
    assert content.decode(group, 0, wrong, [second], 1)[second] != right[second]


def test_adding_a_bucket_twice_cancels_out() -> None:
    one: content.Parity = frozenset({(0, 5)})
    assert one ^ one == content.NOTHING
    assert content.flipped(one, 1) != one
