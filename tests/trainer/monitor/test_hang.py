"""When training is taken to hang, and whom the reports name."""

import os
import threading
import time
from pathlib import Path

import pytest

from keepwarm.exit_code import ExitCode
from keepwarm.trainer.distributed.world import COLLECTIVE_TIMEOUT
from keepwarm.trainer.job.sections import HealthSpec
from keepwarm.trainer.monitor import events, flight_recorder, hang, hang_report, last_words
from keepwarm.trainer.monitor import watchdog as watchdogs
from keepwarm.trainer.monitor.flight_recorder import Flight
from keepwarm.trainer.monitor.hang import Report, Waiting
from keepwarm.trainer.monitor.last_words import LAST_WORDS, LastWords
from keepwarm.trainer.monitor.watchdog import GRACE, LOOK_INTERVAL, WAIT_LIMIT, Watchdog

REDUCE = Waiting(group="data (3)", operation="gloo:all_reduce", number=7)
DEADLINE = 60.0


def report(rank: int, *waiting: Waiting, reached: int = 7) -> Report:
    return Report(rank=rank, step=11, seconds=4.0 + rank, waiting=waiting, reached={"data (3)": reached}, stacks="")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([], None),
        ([1.0, 1.0], None),
        ([1.0, 1.0, 1.0], 120.0),
        ([20.0, 30.0, 400.0], 300.0),
        ([900.0] + [20.0] * 32, 200.0),
    ],
)
def test_hang_deadline_follows_median_of_newest_steps(seconds: list[float], expected: float | None) -> None:
    assert hang.deadline(seconds, floor=120.0, factor=10.0) == expected


@pytest.mark.parametrize(("waited", "frozen"), [(1.0, False), (30.9, False), (31.1, True)])
def test_hang_own_freeze_resets_the_deadline(waited: float, frozen: bool) -> None:
    assert hang.was_frozen(waited, asked=1.0, floor=120.0) is frozen


def test_hang_rank_without_report_is_silent() -> None:
    verdict = hang.judge([report(0, REDUCE), report(2, REDUCE)], 3)
    assert (verdict.silent, verdict.late, verdict.at_fault) == ((1,), (), (1,))
    assert verdict.text == (
        "no progress for 6.0 s in step 12: rank 1 did not answer: the process or its machine is frozen; "
        "ranks 0, 2 in gloo:all_reduce number 7 of group data (3)"
    )


def test_hang_rank_missing_from_collective_is_late() -> None:
    verdict = hang.judge([report(0, REDUCE), report(1, reached=6)], 2)
    assert (verdict.silent, verdict.late, verdict.at_fault) == ((), (1,), (1,))
    assert "rank 1 did not reach a collective that others wait in" in verdict.text


def test_hang_ranks_of_other_groups_are_not_late() -> None:
    other = Report(rank=1, step=11, seconds=4.0, waiting=(), reached={"data (4)": 2}, stacks="")
    verdict = hang.judge([report(0, REDUCE), other], 2)
    assert (verdict.silent, verdict.late) == ((), ())
    assert verdict.text.endswith("rank 1 in no collective")


def test_hang_ranks_that_wait_for_each_other_blame_nobody() -> None:
    """As where two ranks enter two collectives in different orders: no node is at fault."""
    other = Waiting(group="tensor (1)", operation="gloo:all_reduce", number=5)
    first = Report(rank=0, step=11, seconds=4.0, waiting=(REDUCE,), reached={"data (3)": 7, "tensor (1)": 4}, stacks="")
    second = Report(rank=1, step=11, seconds=4.0, waiting=(other,), reached={"data (3)": 6, "tensor (1)": 5}, stacks="")
    verdict = hang.judge([first, second], 2)
    assert (verdict.late, verdict.at_fault) == ((0, 1), ())


def test_hang_message_that_does_not_come_blames_the_rank_that_waits_for_nothing() -> None:
    """Messages have numbers of their own: a stage that has had fewer collectives than messages is not late."""
    waits = Waiting(group="pipeline (2)", operation="nccl:recv 0<-1", number=40, message=True)
    reports = [
        Report(rank=rank, step=11, seconds=4.0, waiting=waiting, reached={"pipeline (2)": 3}, stacks="")
        for rank, waiting in enumerate([(waits,), (waits,), ()])
    ]
    verdict = hang.judge(reports, 3)
    assert (verdict.late, verdict.at_fault) == ((2,), (2,))
    assert "rank 2 did not reach a message that others wait for" in verdict.text
    assert hang.judge(reports[:2], 2).at_fault == ()


class Ended:
    """Stands for the end of a process."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.event = threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self.event.set()


def watchdog(folder: Path, ended: Ended, rank: int = 0, **health: float | None) -> Watchdog:
    spec = HealthSpec.model_validate({"min_hang_timeout": 0.2, "hang_factor": 2.0} | health)
    return Watchdog(spec, folder, rank=rank, size=2, restart=1, end=ended)


def test_hang_ranks_end_and_the_lowest_reports(tmp_path: Path) -> None:
    ended = [Ended(), Ended()]
    dogs = [watchdog(tmp_path, one, rank) for rank, one in enumerate(ended)]
    for step in range(hang.KNOWN + 1):
        for dog in dogs:
            dog.heartbeat(step)
    for one in ended:
        assert one.event.wait(DEADLINE)
        assert one.code == ExitCode.HUNG
    (event,) = events.read(tmp_path).of(events.Hang)
    assert (event.step, event.silent) == (hang.KNOWN, ())
    assert sorted(path.name for path in Path(event.reports).iterdir()) == [
        "rank_00000.json",
        "rank_00001.json",
        "verdict.json",
    ]
    assert "test_hang.py" in (Path(event.reports) / "rank_00000.json").read_text()


def test_hang_suspended_or_disabled_watchdog_does_nothing(tmp_path: Path) -> None:
    ended = Ended()
    for relaxed, health in ((True, {}), (False, {"min_hang_timeout": None})):
        dog = watchdog(tmp_path, ended, **health)
        for step in range(hang.KNOWN + 1):
            dog.heartbeat(step)
        if relaxed:
            dog.suspend()
        assert not ended.event.wait(1.0)
        dog.close()
    assert events.read(tmp_path).events == ()


def flight(*, ended: bool = False) -> Flight:
    """Return an all-reduce that this process has called half a minute ago."""
    return Flight(
        group="data (3)",
        operation="gloo:all_reduce",
        number=7,
        message=False,
        began=time.time_ns() - 30_000_000_000,
        ended=ended,
    )


@pytest.mark.parametrize("where", ["evaluation or checkpoint", "first steps", "usual step with a long limit"])
def test_hang_outside_of_usual_steps_is_found_before_the_collective_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Both ranks end with a verdict: the one that waits, and the one that others wait for, which waits for nothing."""
    monkeypatch.setattr(watchdogs, "WAIT_LIMIT", 0.9)
    monkeypatch.setattr(flight_recorder, "read", lambda: [flight()])
    ended, words = [Ended(), Ended()], LastWords()
    monkeypatch.setenv(LAST_WORDS, words.path)
    dogs = [watchdog(tmp_path, one, rank, min_hang_timeout=8.0) for rank, one in enumerate(ended)]
    for dog in dogs:
        if where == "evaluation or checkpoint":
            dog.suspend()
        for step in range({"first steps": 1, "usual step with a long limit": hang.KNOWN + 1}.get(where, 0)):
            dog.heartbeat(step)
    for one in ended:
        assert one.event.wait(DEADLINE)
        assert one.code == ExitCode.HUNG
    assert len(events.read(tmp_path).of(events.Hang)) == 1
    assert words.read() == [last_words.Hang(()), last_words.Hang(())]  # both wait in the same collective


def test_hang_rank_that_waits_for_nothing_follows_the_report_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdogs, "WAIT_LIMIT", 0.9)
    monkeypatch.setattr(flight_recorder, "read", list)
    ended = Ended()
    dog = watchdog(tmp_path, ended, 1, min_hang_timeout=8.0)
    dog.suspend()
    assert not ended.event.wait(2.0)
    folder = tmp_path / "hangs" / "restart_001_step_0000001"
    folder.mkdir(parents=True)
    hang_report.write(
        folder, Report(rank=0, step=0, seconds=1.0, waiting=(REDUCE,), reached={"data (3)": 7}, stacks="")
    )
    os.utime(folder / "rank_00000.json", (time.time() - 3600,) * 2)  # of an earlier start with the same number
    assert not ended.event.wait(2.0)
    os.utime(folder / "rank_00000.json", (time.time() + 60,) * 2)
    assert ended.event.wait(DEADLINE)
    assert ended.code == ExitCode.HUNG


def test_hang_suspended_rank_in_no_collective_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdogs, "WAIT_LIMIT", 0.9)
    monkeypatch.setattr(flight_recorder, "read", lambda: [flight(ended=True)])
    ended = Ended()
    dog = watchdog(tmp_path, ended, 0, min_hang_timeout=8.0)
    dog.suspend()
    assert not ended.event.wait(3.0)
    dog.close()


def test_hang_verdict_comes_before_collectives_time_out() -> None:
    assert WAIT_LIMIT + LOOK_INTERVAL + GRACE[1] < COLLECTIVE_TIMEOUT.total_seconds()
