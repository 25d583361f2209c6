"""What follows when the ranks of a batch job have ended; tests/slurm has jobs that end so."""

import pytest

from keepwarm.exit_code import ExitCode
from keepwarm.launch.slurm.handover import saved_by
from keepwarm.launch.slurm.verdict import (
    SLURM_ENDS_IT,
    Outcome,
    Verdict,
    fruitless_starts,
    handed_over,
    verdict,
)
from keepwarm.launch.slurm.watcher import IDLE_S, SILENCE_S, TURN_S, due
from keepwarm.trainer.monitor import events

BATCH_KILLED = None
JOB = "7_2"


@pytest.mark.parametrize(
    ("outcome", "what", "why"),
    [
        (Outcome(code=0, ending="slurm"), "done", "finished"),
        (Outcome(code=130, saved=12), "requeue", "the state after step 12 is saved"),
        (Outcome(code=130), "requeue", "nothing new had to be saved"),
        (Outcome(code=128 + 10), "requeue", "nothing new had to be saved"),
        (Outcome(code=128 + 10, fruitless=3), "requeue", ""),
        (Outcome(code=128 + 10, fruitless=4), "give up", "4 starts in a row completed no new step"),
        (Outcome(code=128 + 15, crashed=True), "again", "exit code 143"),
        (Outcome(code=130, ending="slurm"), "give up", SLURM_ENDS_IT),
        (Outcome(code=130, ending="user", saved=3), "cancel", "cancelled: the state after step 3 is saved"),
        (Outcome(code=6, ending="user"), "cancel", "could not be saved"),
        (Outcome(code=1, ending="user"), "cancel", "nothing new"),
        (Outcome(code=3, ending="user"), "give up", "training stopped itself"),
        (Outcome(code=2, crashed=True), "give up", "bad input"),
        (Outcome(code=3, crashed=True), "give up", "training stopped itself"),
        (Outcome(code=4, crashed=True), "again", ""),
        (Outcome(code=6, crashed=True, fruitless=3), "requeue", "could not be saved"),
        (Outcome(code=6, crashed=True, fruitless=4), "give up", "could not be saved"),
        (Outcome(code=6, ending="slurm"), "give up", SLURM_ENDS_IT),
        (Outcome(code=137, crashed=True, failures=3), "again", ""),
        (Outcome(code=137, crashed=True, failures=4), "give up", "4 starts in a row failed without a step"),
    ],
)
def test_verdict_follows_from_how_the_ranks_ended(outcome: Outcome, what: Verdict, why: str) -> None:
    found, said = verdict(outcome, 3)
    assert found == what
    assert why in said


def log_of(*starts: tuple[int, int, int | None], job: str = JOB) -> list[events.Event]:
    """Events of starts, each with its number, the step it began after, and the exit code of its ranks if requeued."""
    found: list[events.Event] = []
    for requeues, step, code in starts:
        found.append(events.BatchStarted(slurm_job=job, nodes=("n1",), requeues=requeues, step=step))
        if code is not BATCH_KILLED:
            found.append(events.BatchEnded(slurm_job=job, code=code, verdict="requeue", why="x"))
            found.append(events.Requeue(slurm_job=job, why="x", excluded=()))
    return found


@pytest.mark.parametrize(
    ("log", "restarts", "step", "code", "count"),
    [
        ([], 0, 0, 130, 1),
        (log_of((0, 0, None)), 0, 5, 130, 0),
        (log_of((0, 0, None)), 0, 0, 130, 1),
        (log_of((0, 0, 130), (1, 0, 130), (2, 0, None)), 2, 0, 130, 3),
        (log_of((0, 0, 130), (1, 8, 130), (2, 8, None)), 2, 8, 130, 2),
        # A start that repeats what an earlier one had done has done nothing new.
        (log_of((0, 0, 1), (1, 8, 1), (2, 6, None)), 2, 7, 1, 2),
        # One that SLURM ended from outside does not count.
        (log_of((0, 0, None), (1, 0, None), (2, 0, 130), (3, 0, None)), 3, 0, 130, 2),
        # One that was to be requeued and was not does: it had an end of its own.
        ([*log_of((0, 0, None)), events.RequeueRefused(slurm_job=JOB, why="x"), *log_of((1, 0, None))], 1, 0, 130, 2),
        # One without a trace does: the disk was full.
        (log_of((0, 0, 130)), 3, 0, 130, 4),
        (log_of((0, 0, 6), (1, 9, None)), 1, 12, 6, 2),
        (log_of((0, 0, 130), (1, 0, 130), job="7_1"), 0, 0, 130, 1),
    ],
)  # fmt: skip
def test_fruitless_starts_are_counted_since_the_last_new_step(
    log: list[events.Event], restarts: int, step: int, code: int, count: int
) -> None:
    assert fruitless_starts(log, JOB, restarts, step, code) == count


def test_handed_over_end_is_that_which_a_watcher_decided() -> None:
    started, requeue = log_of((0, 0, None))[0], events.Requeue(slurm_job=JOB, why="x", excluded=())
    done = events.BatchEnded(slurm_job=JOB, code=ExitCode.DONE, verdict="done", why="x")
    again = events.BatchEnded(slurm_job=JOB, code=1, verdict="requeue", why="x")
    assert handed_over([started, done, requeue], JOB) == done
    assert handed_over([started, done, requeue], "8") is None
    assert handed_over([started, done], JOB) is None
    assert handed_over([started, again, requeue], JOB) is None
    assert handed_over([started, done, requeue, started], JOB) is None
    assert handed_over([], JOB) is None


def test_saved_by_the_last_start_alone() -> None:
    saved = events.Interrupted(step=4)
    assert saved_by((*log_of((0, 0, None)), saved), JOB) == 4
    assert saved_by((saved, *log_of((1, 4, None))), JOB) is None


def test_watcher_is_due_after_silence_and_idleness_in_turn() -> None:
    late = SILENCE_S + 1
    assert due(now=late, heard=0.0, idle_since=0.0, place=0)
    assert not due(now=late, heard=2.0, idle_since=0.0, place=0)
    assert not due(now=late, heard=0.0, idle_since=None, place=0)
    assert not due(now=late, heard=0.0, idle_since=late - 1, place=0)
    assert due(now=late + IDLE_S, heard=0.0, idle_since=late - 1, place=0)
    assert not due(now=late, heard=0.0, idle_since=0.0, place=1)
    assert due(now=late + TURN_S, heard=0.0, idle_since=0.0, place=1)
