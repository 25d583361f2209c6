import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.ft.worker.interval import QUIET_STEPS, SMOOTHING, UNPAUSED, Interval, waste, young_daly

seconds = st.floats(1e-4, 1e3)
mtbfs = st.floats(1e3, 1e7)


def test_young_daly_matches_published_example() -> None:
    """16,384 GPUs, 419 stops in 54 days: M = 3.1 h; disk checkpoints (C 30 s, R 600 s) waste 12.7 %, memory 0.4 %."""
    mtbf = 54 * 86400 / 419
    assert waste(young_daly(30, mtbf), 30, mtbf, 600) == pytest.approx(0.127, abs=0.001)
    assert waste(young_daly(0.01, mtbf), 0.01, mtbf, 30) == pytest.approx(0.0040, abs=0.0002)


@settings(deadline=None)
@given(seconds, mtbfs, st.floats(0.01, 100))
def test_young_daly_no_other_period_wastes_less(cost: float, mtbf: float, factor: float) -> None:
    best = young_daly(cost, mtbf)
    assert waste(best, cost, mtbf) <= waste(best * factor, cost, mtbf) * (1 + 1e-12)


@settings(deadline=None)
@given(seconds, seconds, seconds, mtbfs)
def test_interval_steps_cover_period_and_commit(step: float, copy: float, commit: float, mtbf: float) -> None:
    interval = Interval(mtbf).measured(step=step, copy=copy, commit=commit)
    assert interval.steps * step >= max(young_daly(copy, mtbf), commit) * (1 - 1e-6)
    assert interval.steps == 1 or (interval.steps - 1) * step <= max(young_daly(copy, mtbf), commit) * (1 + 1e-6)


def test_interval_every_step_until_measured_then_follows() -> None:
    interval = Interval(mtbf=10_000)
    assert interval.steps == interval.measured(step=1.0).steps == 1
    interval = interval.measured(step=1.0, copy=0.02)
    assert interval.steps == 20
    for _ in range(100):
        interval = interval.measured(copy=0.00018)
    assert interval.steps == 2
    assert interval.measured(commit=50.0).steps == 50


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_interval_invalid_measurements_are_ignored(value: float) -> None:
    interval = Interval(100.0, step=1.0, copy=1.0, commit=1.0)
    assert interval.measured(step=value, copy=value, commit=value) == interval


@pytest.mark.parametrize(("cost", "mtbf"), [(-1.0, 1.0), (1.0, 0.0), (math.inf, 1.0), (1.0, math.nan)])
def test_young_daly_invalid_arguments_are_refused(cost: float, mtbf: float) -> None:
    with pytest.raises(ValueError, match="mtbf"):
        young_daly(cost, mtbf)


def trained(interval: Interval, *, quiet: float, beside: float, rounds: int = 200) -> Interval:
    """Return what is known after `rounds` snapshots; the first step beside each is slower, training never waits."""
    for _ in range(rounds):
        for step in range(interval.steps):
            interval = interval.stepped(beside if step == 0 else quiet, beside=step == 0)
        interval = interval.taken(blocked=0.0, commit=quiet)
    return interval


def test_interval_slower_steps_beside_a_snapshot_are_its_cost() -> None:
    """Training never waits for this snapshot, but the step beside it takes half a second longer."""
    interval = trained(Interval(mtbf=10_000).stepped(60.0, beside=True), quiet=10.0, beside=10.5)
    assert interval.copy == pytest.approx(0.5, rel=0.01)
    assert interval.steps == math.ceil(young_daly(0.5, 10_000) / 10.0)


def test_interval_snapshots_that_cost_nothing_are_as_frequent_as_commits_allow() -> None:
    interval = trained(Interval(mtbf=10_000), quiet=10.0, beside=10.0)
    assert interval.copy == pytest.approx(0.0, abs=1e-6)
    assert interval.steps == 1


def test_interval_snapshots_without_a_pause_make_room_for_quiet_steps() -> None:
    interval = Interval(mtbf=10_000)
    for _ in range(UNPAUSED):
        assert interval.steps == 1
        interval = interval.stepped(10.5, beside=True).taken(blocked=0.0, commit=10.0)
    assert interval.steps == 1 + QUIET_STEPS
    for _ in range(QUIET_STEPS):
        interval = interval.stepped(10.0, beside=False)
    assert (interval.step, interval.steps) == (10.0, 1)
    interval = interval.stepped(10.5, beside=True).taken(blocked=0.0, commit=10.0)
    assert interval.copy == pytest.approx(SMOOTHING * 0.5)


@pytest.mark.parametrize("now", [5.0, 20.0])
def test_interval_steps_that_become_faster_or_slower_do_not_count_as_cost_for_long(now: float) -> None:
    interval = trained(Interval(mtbf=10_000), quiet=10.0, beside=10.5)
    interval = trained(interval, quiet=now, beside=now + 0.25)
    assert interval.step == pytest.approx(now, rel=0.01)
    assert interval.copy == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_interval_invalid_steps_are_ignored(value: float) -> None:
    interval = Interval(100.0, step=1.0, quiet=3)
    assert interval.stepped(value, beside=True) == interval.stepped(value, beside=False) == interval
