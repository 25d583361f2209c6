"""When training is taken to hang, and whom the reports name."""

import threading
from pathlib import Path

import pytest

from keepwarm.exit_code import ExitCode
from keepwarm.trainer.job.sections import HealthSpec
from keepwarm.trainer.monitor import events, hang
from keepwarm.trainer.monitor.hang import Report, Waiting
from keepwarm.trainer.monitor.watchdog import Watchdog

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
    assert (verdict.silent, verdict.late) == ((1,), ())
    assert verdict.text == (
        "no progress for 6.0 s in step 12: rank 1 did not answer: the process or its machine is frozen; "
        "ranks 0, 2 in gloo:all_reduce number 7 of group data (3)"
    )


def test_hang_rank_missing_from_collective_is_late() -> None:
    verdict = hang.judge([report(0, REDUCE), report(1, reached=6)], 2)
    assert (verdict.silent, verdict.late) == ((), (1,))
    assert "rank 1 did not reach a collective that others wait in" in verdict.text


def test_hang_ranks_of_other_groups_are_not_late() -> None:
    other = Report(rank=1, step=11, seconds=4.0, waiting=(), reached={"data (4)": 2}, stacks="")
    verdict = hang.judge([report(0, REDUCE), other], 2)
    assert (verdict.silent, verdict.late) == ((), ())
    assert verdict.text.endswith("rank 1 in no collective")


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
