"""The account of a run's time: hand-made histories, and properties of any history."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.goodput import (
    KINDS,
    Mark,
    Outage,
    Timeline,
    goodput,
    of_run,
    read_marks,
    spans,
    write_result,
)


def marks(*lines: tuple[Any, ...]) -> list[Mark]:
    """(session, time, mark, step, stalled)."""
    return [
        Mark(session=s, time=float(t), mark=m, step=(*rest, 0, 0)[0], stalled=(*rest, 0, 0)[1], restart=s > 1)
        for s, t, m, *rest in lines
    ]


def table(found: list[Mark], *outages: Outage) -> dict[str, float]:
    return {kind: seconds for kind, seconds in goodput(found, outages).seconds.items() if seconds}


FIRST = marks(
    (1, 100, "start"),
    (1, 110, "restored", 0),
    (1, 112, "evaluation", 0),
    (1, 115, "step", 1, 0.5),
    (1, 118, "step", 2, 1.0),
    (1, 119, "save", 2),
    (1, 122, "step", 3, 1.0),
)


def test_goodput_undisturbed_run_is_accounted() -> None:
    found = [*FIRST, *marks((1, 123, "end", 3))]
    assert table(found) == {"productive": 8.0, "snapshot stall": 2.0, "start-up": 11.0, "evaluation": 2.0}
    account = goodput(found)
    assert (account.wall, account.steps, account.steps_lost, account.restarts) == (23.0, 3, 0, 0)
    assert account.share == pytest.approx(8 / 23)
    assert "34.8% of 23.0 s: productive 8.0 s" in account.text()


def test_goodput_failure_costs_steps_after_the_restored_one() -> None:
    found = [*FIRST, *marks((2, 130, "start"), (2, 134, "restored", 2), (2, 137, "step", 3), (2, 138, "end", 3))]
    # Noticed at 126, a second late: 3 s of the fourth step are lost besides the third with its 3 s.
    assert table(found, Outage(126, 1.0)) == {
        "productive": 2.5 + 2.5 + 3,
        "snapshot stall": 2.0,
        "lost work": 3.0 + 3.0,
        "detection": 1.0,
        "recovery": 8.0,
        "start-up": 11.0,
        "evaluation": 2.0,
    }
    account = goodput(found, [Outage(126, 1.0)])
    assert (account.steps, account.steps_lost, account.restarts) == (3, 1, 1)


def test_goodput_without_outage_dates_failure_at_next_start() -> None:
    found = [*FIRST, *marks((2, 130, "start"), (2, 134, "restored", 3), (2, 137, "step", 4))]
    assert table(found)["lost work"] == 8.0
    assert table(found)["recovery"] == 4.0


def test_goodput_repeated_evaluation_is_lost() -> None:
    found = marks((1, 0, "start"), (1, 1, "restored"), (1, 3, "evaluation"), (2, 3, "start"), (2, 4, "restored"))
    assert table(found) == {"lost work": 2.0, "recovery": 1.0, "start-up": 1.0}


def test_goodput_failure_during_start_loses_no_work() -> None:
    found = marks((1, 0, "start"), (2, 5, "start"), (2, 7, "restored"), (2, 8, "step", 1))
    assert table(found) == {"start-up": 5.0, "recovery": 2.0, "productive": 1.0}


def test_goodput_time_between_end_and_continuation_is_excluded() -> None:
    found = marks((1, 0, "start"), (1, 1, "restored"), (1, 2, "step", 1), (1, 2, "end", 1))
    later = Mark(session=2, time=1000.0, mark="start")
    account = goodput([*found, later, *marks((2, 1001, "restored", 1), (2, 1003, "step", 2))])
    assert account.wall == 5.0
    assert account.stopped == 998.0
    assert account.seconds["start-up"] == 2.0


def test_goodput_frozen_process_that_resumes_changes_nothing() -> None:
    found = [*FIRST, *marks((2, 130, "start"), (2, 134, "restored", 2), (2, 137, "step", 3))]
    woken = marks((1, 135, "step", 4))
    assert goodput([*found[:-1], *woken, found[-1]]) == goodput(found)


TIMES = st.floats(0, 50, allow_nan=False, width=32)


@st.composite
def histories(draw: Callable[[Any], Any]) -> tuple[list[Mark], list[Outage]]:
    """Sessions that train, evaluate, save, fail and end, under a clock that may be set back."""
    made: list[Mark] = []
    now, step = 1e9, 0

    def later() -> float:
        nonlocal now
        now += draw(st.one_of(TIMES, st.just(-3.0)))
        return now

    for session in range(draw(st.integers(1, 4))):
        made.append(Mark(session=session, time=later(), mark="start", restart=draw(st.booleans())))
        if draw(st.booleans()):
            step = draw(st.integers(0, step))
            made.append(Mark(session=session, time=later(), mark="restored", step=step))
            for kind in draw(st.lists(st.sampled_from(["step", "step", "evaluation", "save"]), max_size=6)):
                step += kind == "step"
                made.append(Mark(session=session, time=later(), mark=kind, step=step, stalled=draw(TIMES)))
            if draw(st.booleans()):
                made.append(Mark(session=session, time=later(), mark="end", step=step))
    outages = draw(st.lists(st.builds(Outage, st.floats(1e9 - 100, 1e9 + 400), TIMES), max_size=3))
    return made, outages


@settings(deadline=None)
@given(histories())
def test_goodput_every_second_is_accounted_once(history: tuple[list[Mark], list[Outage]]) -> None:
    found, outages = history
    account = goodput(found, outages)
    made = spans(found, outages)
    assert all(earlier.stop == later.start for earlier, later in itertools.pairwise(made))
    assert all(span.seconds >= 0 for span in made)
    assert set(account.seconds) == set(KINDS)
    end = max(mark.time for mark in found)
    assert account.wall + account.stopped == pytest.approx(end - found[0].time if made else 0.0, abs=1e-5)
    assert account.steps + account.steps_lost == sum(mark.mark == "step" for mark in found)


@settings(deadline=None)
@given(histories())
def test_goodput_kept_steps_are_counted_once(history: tuple[list[Mark], list[Outage]]) -> None:
    kept = [span.step for span in spans(*history) if span.completes and span.kind == "productive"]
    assert kept == sorted(set(kept))


def test_goodput_file_survives_restarts_and_torn_lines(tmp_path: Path) -> None:
    first = Timeline(tmp_path, rank=0, began=0.0, restart=False, fresh=True)
    first.restored(0)
    first.step(1, 0.0)
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"time": 17')
        file.write("\n")
    Timeline(tmp_path, rank=1, began=0.0, restart=True, fresh=False).step(7, 0.0)
    second = Timeline(tmp_path, rank=0, began=0.0, restart=True, fresh=False)
    second.restored(0)
    second.evaluation(0)
    second.step(1, 0.0)
    second.save(1)
    second.close(1, ended=True)
    assert [mark.mark for mark in read_marks(tmp_path)] == [
        "start", "restored", "step", "start", "restored", "evaluation", "step", "save", "end",
    ]  # fmt: skip
    assert write_result(tmp_path) == of_run(tmp_path)
    stored = json.loads((tmp_path / "goodput.json").read_text())
    assert (stored["steps"], stored["steps_lost"], stored["restarts"]) == (1, 1, 1)
    assert stored["wall_s"] == pytest.approx(sum(stored["seconds"].values()))


def test_goodput_outages_come_from_supervisor_events(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, rank=0, began=100.0, restart=False, fresh=True)
    timeline.close(0, ended=False)
    lines = [
        *FIRST,
        *marks((2, 130, "start"), (2, 134, "restored", 2), (2, 137, "step", 3)),
    ]
    text = [json.dumps({key: getattr(mark, key) for key in mark.__struct_fields__}) for mark in lines]
    (tmp_path / "goodput.jsonl").write_text("\n".join(text) + "\n")
    log: list[events.Event] = [
        events.SupervisorStarted(time=99.0, node="a", slots=3),
        events.Failure(time=126.0, node="a", kind="lost", cause="node", slots=(1,)),
        events.Failure(time=126.5, node="a", kind="lost", cause="node", slots=(2,)),
        events.Recovery(
            time=137.0, level="decoded", why="node", slots=(1, 2), source="memory", step=2, bytes_decoded=1,
            phases={"detect": 1.0, "start": 3.0},
        ),
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, log)) + b"\n{")
    assert of_run(tmp_path) == goodput(lines, [Outage(126, 1.0)])
