"""Replay: what is drawn again, in what order, and how much of it."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.replay import Pool, Replay
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.errors import CheckpointError, DataError, SpecError
from tests.support.corpus import counting_source

SOURCES = {name: counting_source(name, size, first=1000 * size) for name, size in (("a", 60), ("b", 90), ("c", 400))}
IDENTITIES = {source.identity: name for name, source in SOURCES.items()}
Ids = list[tuple[str, int]]


def clause(*origins: str, fraction: float = 0.25, seed: int = 0, exponent: float | None = None) -> ReplaySpec:
    law = "uniform" if exponent is None else "power"
    return ReplaySpec.model_validate(
        {"from": origins, "fraction": fraction, "seed": seed, "distribution": law, "exponent": exponent}
    )


def ids_of(ledger: Ledger, start: int, end: int, *, replayed: bool | None = None) -> Ids:
    """Name and sample number at positions from `start` to `end`; only replayed or only new ones when asked."""
    draw = ledger.samples_at(np.arange(start, end))
    return [
        (IDENTITIES[draw.identities[source]], k)
        for source, k, again in zip(draw.source.tolist(), draw.k.tolist(), draw.replayed.tolist(), strict=True)
        if replayed is None or again == replayed
    ]


def three_stages(*clauses: ReplaySpec, first: int = 40, second: int = 30) -> Ledger:
    ledger = Ledger(seed=1).opened({"a": 3, "b": 1}, SOURCES, stage="one")
    ledger = ledger.opened({"b": 1}, SOURCES, start=first, stage="two")
    return ledger.opened({"c": 1}, SOURCES, start=first + second, stage="three", replay=clauses)


laws = st.sampled_from([None, 0.5, 2.0])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([0.01, 0.05, 0.25, 0.9]), laws)
def test_replay_draws_only_past_samples_in_the_asked_fraction(
    first: int, second: int, fraction: float, exponent: float | None
) -> None:
    ledger = three_stages(clause(fraction=fraction, exponent=exponent), first=first, second=second)
    begin, end = first + second, first + second + 300
    seen = set(ids_of(ledger, 0, begin))
    assert set(ids_of(ledger, begin, end, replayed=True)) <= seen
    for position in range(begin, end):
        realised = ledger.replayed(position).get("three", 0)
        assert abs(realised - round(fraction * 65_536) / 65_536 * (position - begin)) <= 1
    assert ledger.replayed(end).get("three", 0) == len(ids_of(ledger, begin, end, replayed=True))


def test_replay_uniform_repeats_only_after_a_full_pass() -> None:
    ledger = three_stages(clause(fraction=0.5))
    again = ids_of(ledger, 70, 70 + 2 * 140, replayed=True)
    assert len(again) == 140
    assert sorted(again[:70]) == sorted(again[70:]) == sorted(ids_of(ledger, 0, 70))
    assert again[:70] != again[70:]
    assert again[:70] != ids_of(ledger, 0, 70)


def test_replay_second_phase_and_other_seed_change_the_order() -> None:
    one = three_stages(clause("one", fraction=0.5))
    other_seed = three_stages(clause("one", fraction=0.5, seed=1))
    later = one.opened({"c": 1}, SOURCES, start=150, stage="four", replay=(clause("one", fraction=0.5),))
    first, second = ids_of(one, 70, 150, replayed=True), ids_of(later, 150, 230, replayed=True)
    assert sorted(first) == sorted(second) == sorted(ids_of(other_seed, 70, 150, replayed=True))
    assert len({tuple(order) for order in (first, second, ids_of(other_seed, 70, 150, replayed=True))}) == 3


def test_replay_from_named_stages_and_sources_draws_only_those() -> None:
    assert {name for name, _ in ids_of(three_stages(clause("two")), 70, 300, replayed=True)} == {"b"}
    of_a = three_stages(clause("a", fraction=0.5))
    assert set(ids_of(of_a, 70, 200, replayed=True)) == {one for one in ids_of(of_a, 0, 40) if one[0] == "a"}
    both = ids_of(three_stages(clause("two", "a", fraction=0.5)), 70, 400, replayed=True)
    assert Counter(name for name, _ in set(both)) == {"a": 30, "b": 30}


def test_replay_two_clauses_have_their_own_shares() -> None:
    ledger = three_stages(clause("one", fraction=0.25), clause("two", fraction=0.125))
    assert len(ids_of(ledger, 70, 70 + 800, replayed=True)) == 300
    assert ledger.replayed(870) == {"three": 300}


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_replay_power_law_weights_past_stages(exponent: float) -> None:
    sizes = {3: 7, 1: 900, 0: 40}
    pools = tuple(Pool(stage=str(age), age=age, runs=((f"s{age}", 10, 10 + size),)) for age, size in sizes.items())
    replay = Replay(stage="now", law="power", exponent=exponent, key="0/4", pools=pools)
    count = 60_000
    source, k = replay.draw(np.arange(count))
    weights = np.array([(1 + pool.age) ** -exponent for pool in pools])
    weights /= weights.sum()
    found = np.bincount(source, minlength=3)
    assert (np.abs(found - count * weights) <= 3 * np.sqrt(count * weights * (1 - weights))).all()
    for place, pool in enumerate(pools):
        numbers, times = np.unique(k[source == place], return_counts=True)
        assert numbers.tolist() == list(range(10, 10 + pool.size))
        assert times.max() <= times.mean() + 6 * np.sqrt(times.mean())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), laws, st.data())
def test_replay_saved_and_replanned_gives_same_stream(
    stops: list[int], exponent: float | None, data: st.DataObject
) -> None:
    """What the training loop does when it continues: load, then lay down every stage that is not over again."""
    clauses = (clause(fraction=0.3, exponent=exponent),)
    whole = three_stages(*clauses)
    ledger, seen = whole, []
    for stop in stops:
        at = ledger.position
        seen += ids_of(ledger, at, at + stop)
        ledger = Ledger.load(json.loads(json.dumps(ledger.advanced(stop).save())))
        for begin, end, mixture, stage, replay in (
            (0, 40, {"a": 3, "b": 1}, "one", ()),
            (40, 70, {"b": 1}, "two", ()),
            (70, 1000, {"c": 1}, "three", clauses),
        ):
            if end > ledger.position:
                start = max(begin, ledger.position)
                ledger = ledger.opened(mixture, SOURCES, start=start, stage=stage, replay=replay)
    assert seen == ids_of(whole, 0, len(seen))
    assert ids_of(ledger, 70, 300) == ids_of(whole, 70, 300)
    assert ledger.segments == whole.segments


def test_replay_changed_fraction_continues_the_same_pass() -> None:
    ledger = three_stages(clause(fraction=0.5)).advanced(110)
    more = ledger.opened({"c": 1}, SOURCES, stage="three", replay=(clause(fraction=0.75),))
    again = ids_of(more, 70, 110 + 68, replayed=True)
    assert len(again) == 20 + 51
    assert sorted(again[:70]) == sorted(ids_of(ledger, 0, 70))
    assert [mark.name for mark in more.stages] == ["one", "two", "three"]


def test_replay_of_parent_continues_where_it_stopped() -> None:
    parent = three_stages().advanced(100)
    ledger = parent.continued("parent").opened({"c": 1}, SOURCES, stage="child", replay=(clause("one", fraction=0.5),))
    assert [(stage.run, stage.name, stage.samples) for stage in ledger.past] == [
        ("parent", "one", 40),
        ("parent", "two", 30),
        ("parent", "three", 30),
    ]
    assert sorted(ids_of(ledger, 0, 80, replayed=True)) == sorted(ids_of(parent, 0, 40))
    assert ids_of(ledger, 0, 80, replayed=False) == [("c", k) for k in range(30, 70)]
    grandchild = ledger.advanced(80).continued("child")
    assert [(stage.run, stage.name) for stage in grandchild.past][2:] == [("parent", "three"), ("child", "child")]
    opened = grandchild.opened({"b": 1}, SOURCES, stage="last", replay=(clause("child", fraction=0.5),))
    assert {name for name, _ in ids_of(opened, 0, 80, replayed=True)} == {"c"}
    assert Ledger.load(json.loads(json.dumps(opened.save()))) == opened


def test_replay_proxy_source_is_drawn_whole_and_marked() -> None:
    ledger = Ledger(seed=1).opened(
        {"c": 1}, SOURCES, stage="child", replay=(ReplaySpec(fraction=0.5, proxy_source="a"),)
    )
    assert sorted(ids_of(ledger, 0, 120, replayed=True)) == [("a", k) for k in range(60)]
    assert not ledger.replays[0].known


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (clause("c"), "three.*from c: nothing was seen there"),
        (clause("three"), "'three' is neither an earlier stage"),
        (clause("nowhere"), "'nowhere' is neither an earlier stage"),
        (ReplaySpec(fraction=0.5, proxy_source="z"), "'z' is not in data.sources"),
    ],
)
def test_replay_without_a_past_is_refused(wanted: ReplaySpec, message: str) -> None:
    with pytest.raises((SpecError, DataError), match=message):
        three_stages(wanted)


def test_replay_fractions_adding_up_to_one_are_refused() -> None:
    with pytest.raises(SpecError, match="add up to 1"):
        three_stages(clause("one", fraction=0.5), clause("two", fraction=0.5))


def test_replay_source_missing_from_the_job_is_refused() -> None:
    parent = Ledger(seed=1).opened({"a": 1}, SOURCES, stage="one").advanced(10).continued("parent")
    only_c = {"c": SOURCES["c"]}
    with pytest.raises(DataError, match=r"source 'a' .* not in data\.sources"):
        parent.opened({"c": 1}, only_c, stage="child", replay=(clause(),))


@pytest.mark.parametrize("change", ["pools", "index", "units", "unknown source", "backwards"])
def test_replay_damaged_state_is_refused(change: str) -> None:
    saved: dict[str, Any] = json.loads(json.dumps(three_stages(clause()).advanced(80).save()))
    replay, share = saved["replays"][0], saved["segments"][-1]["replays"][0]
    match change:
        case "pools":
            replay["pools"] = []
        case "index":
            share["replay"] = 1
        case "units":
            share["units"] += 1
        case "unknown source":
            replay["pools"][0]["runs"][0][0] = "nowhere"
        case "backwards":
            replay["pools"][0]["runs"][0][1] = 50
    with pytest.raises(CheckpointError, match="ledger is damaged"):
        Ledger.load(saved)
