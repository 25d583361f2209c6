"""Who keeps the others waiting, found from when each rank began each collective."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from keepwarm.trainer.monitor.flight_recorder import Flight
from keepwarm.trainer.monitor.stragglers import Trace, excess, stragglers
from tests.trainer.loop.test_run import (
    DEADLINE,
    TINY,
    TWO_RANKS,
    events_of,
    keepwarm,
    rank_1_of,
    started,
    wait_for_step,
)

MILLISECOND = 1_000_000


def flight(group: str, number: int, began: int, message: bool = False) -> Flight:
    return Flight(group=group, operation="all_reduce", number=number, message=message, began=began, ended=True)


def traces(
    seconds: Sequence[Sequence[int]], stages: Sequence[int] | None = None, groups: int = 1, communication: int = 0
) -> list[Trace]:
    """Of ranks that compute for so many milliseconds before each collective of their group, and then wait for it."""
    now = [0] * len(seconds)
    flights: list[list[Flight]] = [[] for _ in seconds]
    for number in range(len(seconds[0])):
        arrivals = [now[rank] + own[number] * MILLISECOND for rank, own in enumerate(seconds)]
        for group in range(groups):
            members = range(group, len(seconds), groups)
            for rank in members:
                flights[rank].append(flight(str(group), number, arrivals[rank]))
                now[rank] = max(arrivals[one] for one in members) + communication * MILLISECOND
    return [
        Trace(rank, 0 if stages is None else stages[rank], f"node-{rank}", tuple(own))
        for rank, own in enumerate(flights)
    ]


def test_straggler_waiting_time_does_not_count() -> None:
    assert excess(traces([[10] * 11, [30] * 11])) == pytest.approx({0: 0.0, 1: 2 / 3})


def test_straggler_communication_time_does_not_count() -> None:
    found = excess(traces([[10] * 11, [30] * 11], communication=30))
    assert found == pytest.approx({0: 0.0, 1: 1 / 3})


def test_straggler_slow_rank_is_named_with_its_host() -> None:
    (found,) = stragglers(traces([[10] * 9, [10] * 9, [25] * 9, [10] * 9]), 1.5)
    assert (found.rank, found.host) == (2, "node-2")
    assert found.ratio == pytest.approx(2.5)


def test_straggler_is_judged_within_its_own_group() -> None:
    (found,) = stragglers(traces([[10] * 9, [10] * 9, [40] * 9, [10] * 9], groups=2), 1.5)
    assert found.rank == 2
    assert found.ratio == pytest.approx(4)


def test_straggler_pipeline_stages_are_not_compared() -> None:
    assert not stragglers(traces([[10] * 9, [30] * 9], stages=[0, 1]), 1.5)


def test_straggler_equal_ranks_and_short_traces_have_none() -> None:
    assert not stragglers(traces([[10] * 9] * 4), 1.5)
    assert not stragglers(traces([[10], [90]]), 1.5)
    assert not stragglers([], 1.5)


def test_straggler_time_after_a_message_does_not_count() -> None:
    flights = (flight("a", 0, 0), flight("b", 0, 10, message=True), flight("a", 1, 5000))
    assert excess([Trace(0, 0, "", flights)]) == {0: 0.0}


@pytest.mark.dist
@pytest.mark.ci
@pytest.mark.timeout(600)
def test_straggler_slowed_rank_in_a_run_is_named(tmp_path: Path) -> None:
    folder, log = tmp_path / "slow", tmp_path / "slow.out"
    steps = ["stages.0.tokens=512000", "health.straggler_every=5"]
    with started(keepwarm(str(TINY), f"output={folder}", *TWO_RANKS, *steps), log) as process:
        wait_for_step(folder, 3, process, log)
        victim, end = rank_1_of(process.pid), time.monotonic() + DEADLINE
        while not (named := [event for event in events_of(folder) if event["event"] == "straggler" and event["rank"]]):
            assert time.monotonic() < end, log.read_text()
            # The fault itself: three quarters of its time are taken from the rank.
            for number, seconds in ((signal.SIGSTOP, 0.06), (signal.SIGCONT, 0.02)):
                os.kill(victim, number)
                time.sleep(seconds)
    assert named[0]["ratio"] > 1.3
    assert f"straggler: rank 1 on {named[0]['host']} slows the job down" in log.read_text()
