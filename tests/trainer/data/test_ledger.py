import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.table import table
from keepwarm.trainer.errors import CheckpointError, DataError
from tests.support.corpus import counting_source

SOURCES = {name: counting_source(name, size, first=size) for name, size in (("a", 7), ("b", 50), ("c", 1000))}
IDENTITIES = {source.identity: name for name, source in SOURCES.items()}

mixtures = st.sampled_from(
    [{"a": 1.0}, {"b": 2.0}, {"a": 3.0, "b": 1.0}, {"a": 1.0, "c": 1.0}, {"a": 1.0, "b": 2.0, "c": 4.0}]
)
plans = st.lists(st.tuples(st.integers(1, 60), mixtures), min_size=1, max_size=6)
"""Stages: how many samples, and of what."""


def _planned(plan: list[tuple[int, dict[str, float]]], seed: int = 1) -> Ledger:
    """All stages laid down ahead, as the training loop does."""
    ledger, start = Ledger(seed=seed), 0
    for length, mixture in plan:
        ledger, start = ledger.opened(mixture, SOURCES, start=start), start + length
    return ledger


def _naive(plan: list[tuple[int, dict[str, float]]]) -> list[tuple[str, int]]:
    """Every sample of the plan, by counting one by one."""
    drawn: Counter[str] = Counter()
    order = []
    units: tuple[int, ...] | None = None
    names: list[str] = []
    place = 0
    for length, mixture in plan:
        segment = _planned([(1, mixture)]).segments[0]
        if (tuple(share.units for share in segment.shares), sorted(mixture)) != (units, names):
            units, names, place = tuple(share.units for share in segment.shares), sorted(mixture), 0
        for _ in range(length):
            turns = table(units).turns
            name = names[turns[place % len(turns)]]
            order.append((name, drawn[name]))
            drawn[name] += 1
            place += 1
    return order


def _ids(ledger: Ledger, positions: list[int]) -> list[tuple[str, int]]:
    draw = ledger.samples_at(np.array(positions, np.int64))
    return [
        (IDENTITIES[draw.identities[source]], k)
        for source, k in zip(draw.source.tolist(), draw.k.tolist(), strict=True)
    ]


@settings(deadline=None)
@given(plans, st.randoms(use_true_random=False))
def test_ledger_random_access_equals_counting(plan: list[tuple[int, dict[str, float]]], random: Any) -> None:
    ledger, expected = _planned(plan), _naive(plan)
    positions = list(range(len(expected)))
    random.shuffle(positions)
    assert _ids(ledger, positions) == [expected[position] for position in positions]


@settings(deadline=None)
@given(plans, st.data())
def test_ledger_given_counts_drawn_samples(plan: list[tuple[int, dict[str, float]]], data: st.DataObject) -> None:
    expected = _naive(plan)
    position = data.draw(st.integers(0, len(expected)))
    ledger = _planned(plan).advanced(position)
    counted = Counter(name for name, _ in expected[:position])
    found = {IDENTITIES[identity]: given for identity, given in ledger.given().items()}
    assert {name: given.consumed for name, given in found.items()} == counted
    for name, given_ in found.items():
        assert given_.ranges == ((0, counted[name]),)
        assert ledger.epochs()[SOURCES[name].identity] == counted[name] / SOURCES[name].size


@settings(deadline=None)
@given(plans, st.data())
def test_ledger_saved_and_loaded_continues_identically(
    plan: list[tuple[int, dict[str, float]]], data: st.DataObject
) -> None:
    expected = _naive(plan)
    stop = data.draw(st.integers(0, len(expected)))
    ledger = _planned(plan).advanced(stop)
    loaded = Ledger.load(json.loads(json.dumps(ledger.save())))
    assert loaded == ledger
    assert _ids(loaded, list(range(stop, len(expected)))) == expected[stop:]


@settings(deadline=None)
@given(plans)
def test_ledger_planning_ahead_equals_opening_stage_by_stage(plan: list[tuple[int, dict[str, float]]]) -> None:
    ledger, seen = Ledger(seed=1), []
    for length, mixture in plan:
        ledger = ledger.opened(mixture, SOURCES)
        seen += _ids(ledger, list(range(ledger.position, ledger.position + length)))
        ledger = ledger.advanced(length)
    assert seen == _naive(plan)


def test_ledger_reopening_current_mixture_changes_nothing() -> None:
    ledger = Ledger(seed=1).opened({"a": 1, "b": 3}, SOURCES).advanced(5)
    assert ledger.opened({"b": 6, "a": 2}, SOURCES) == ledger


def test_ledger_new_plan_replaces_future_segments() -> None:
    ledger = _planned([(10, {"a": 1}), (10, {"b": 1}), (10, {"c": 1})]).advanced(12)
    changed = ledger.opened({"a": 1, "c": 1}, SOURCES, start=15)
    assert [segment.start for segment in changed.segments] == [0, 10, 15]
    assert _ids(changed, list(range(15))) == _ids(ledger, list(range(15)))


def test_ledger_skipped_data_leave_a_gap() -> None:
    ledger = Ledger(seed=1).opened({"c": 1}, SOURCES, stage="one").advanced(10)
    ledger = ledger.opened({"c": 1}, SOURCES, stage="two", skip=20).advanced(5)
    (given_,) = ledger.given().values()
    assert given_.ranges == ((0, 10), (30, 35))
    assert given_.consumed == 15
    assert _ids(ledger.opened({"c": 1, "b": 1}, SOURCES).advanced(0), [10, 14]) == [("c", 30), ("c", 34)]
    assert ("c", 35) in _ids(ledger.opened({"c": 1, "b": 1}, SOURCES), [15, 16])


def test_ledger_changing_the_past_is_refused() -> None:
    with pytest.raises(ValueError, match="already consumed"):
        Ledger(seed=1).opened({"a": 1}, SOURCES).advanced(5).opened({"b": 1}, SOURCES, start=4)


def test_ledger_mixture_of_unknown_source_is_refused() -> None:
    with pytest.raises(DataError, match="'z'"):
        Ledger(seed=1).opened({"z": 1}, SOURCES)


def test_ledger_same_data_under_two_names_are_refused() -> None:
    twice = {"x": counting_source("x", 10), "y": counting_source("y", 10)}
    with pytest.raises(DataError, match=r"data\.sources\.x and data\.sources\.y are the same data"):
        Ledger(seed=1).opened({"x": 1, "y": 1}, twice)


def test_ledger_renamed_source_continues_where_it_was() -> None:
    ledger = Ledger(seed=1).opened({"c": 1}, SOURCES).advanced(10)
    renamed = ledger.opened({"d": 1, "b": 1}, {"d": SOURCES["c"], "b": SOURCES["b"]})
    assert ("c", 10) in _ids(renamed, [10, 11])


def test_ledger_drawing_without_a_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="open one first"):
        Ledger(seed=1).samples_at(np.array([0]))


def _broken(change: str) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(
        json.dumps(_planned([(10, {"a": 1, "b": 1}), (1, {"c": 1})]).advanced(12).save())
    )
    match change:
        case "unknown key":
            saved["cursor"] = 1
        case "missing key":
            del saved["seed"]
        case "wrong type":
            saved["position"] = "12"
        case "position":
            saved["position"] = 13
        case "weights":
            saved["segments"][0]["shares"][0]["units"] += 1
        case "order":
            saved["segments"].reverse()
        case "unknown source":
            saved["segments"][0]["shares"][0]["source"] = "nowhere"
        case "given":
            next(iter(saved["given"].values()))["consumed"] += 1
        case "zero weight":
            saved["segments"][0]["shares"][0]["units"] = 0
    return saved


@pytest.mark.parametrize(
    "change",
    [
        "unknown key",
        "missing key",
        "wrong type",
        "position",
        "weights",
        "order",
        "unknown source",
        "given",
        "zero weight",
    ],
)
def test_ledger_damaged_is_refused(change: str) -> None:
    with pytest.raises(CheckpointError, match="ledger is damaged"):
        Ledger.load(_broken(change))


def test_ledger_positions_of_a_long_run_are_found_directly() -> None:
    ledger = Ledger(seed=1).opened({"a": 0.7, "b": 0.2, "c": 0.1}, SOURCES)
    far = 10**15
    name, k = _ids(ledger, [far])[0]
    share = next(s for s in ledger.segments[0].shares if IDENTITIES[s.source] == name)
    assert abs(k - far * share.units / 65_536) <= 1
