"""Decide what follows when the ranks of a batch job have ended. Pure."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from keepwarm.exit_code import ExitCode
from keepwarm.trainer.monitor import events

Verdict = Literal["done", "again", "requeue", "cancel", "give up"]
"""done: the job completes; again: another start on the same nodes; requeue: SLURM runs the job again later; cancel: the
job ends as a user asked; give up: the job fails."""
SLURM_ENDS_IT = "SLURM ends the job"
_POLITE = tuple(128 + number for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the ranks ended."""

    code: int
    """Exit code of srun, the largest of its tasks' codes; 128 + n if signal n ended it."""
    crashed: bool = False
    """Whether a task failed on its own first; srun's treatment of the others is then irrelevant."""
    ending: Literal["slurm", "user"] | None = None
    """Who ends the job: SLURM (scancel, preemption or requeue), which decides what comes next, or `keepwarm cancel`."""
    saved: int | None = None
    """Step of the state that these ranks saved when they were signalled; None: nothing."""
    failures: int = 0
    """Consecutive starts on these nodes, including this one, that failed without completing a step."""
    fruitless: int = 0
    """Consecutive starts of the job, including this one, that completed no new step, as `fruitless_starts` counts."""


def verdict(outcome: Outcome, limit: int) -> tuple[Verdict, str]:
    """Return what follows and why; `limit` is the maximum of failures and of fruitless starts."""
    code = outcome.code
    if code == ExitCode.DONE:
        return "done", "finished"
    if outcome.ending == "slurm":
        return "give up", SLURM_ENDS_IT
    if code in (ExitCode.BAD_INPUT, ExitCode.TRAINING_STOPPED):
        return "give up", "bad input" if code == ExitCode.BAD_INPUT else "training stopped itself"
    if outcome.ending == "user":
        return "cancel", f"cancelled: {_saved(outcome)}"
    if not outcome.crashed and (code == ExitCode.INTERRUPTED or code in _POLITE):
        return bounded(f"the time limit is near, or a user asked for it: {_saved(outcome)}", outcome.fruitless, limit)
    if code == ExitCode.STATE_NOT_SAVED:
        why = "the state could not be saved, as on a full disk; a later start repeats the steps"
        return bounded(why, outcome.fruitless, limit)
    if outcome.failures > limit:
        return "give up", f"{outcome.failures} starts in a row failed without a step (cluster.max_restarts = {limit})"
    return "again", f"ranks ended with exit code {code}"


def bounded(why: str, fruitless: int, limit: int) -> tuple[Verdict, str]:
    """Return a requeue for this reason, unless the job was started too often without a new step."""
    if fruitless > limit:
        return "give up", f"{fruitless} starts in a row completed no new step (cluster.max_restarts = {limit}): {why}"
    return "requeue", why


def _saved(outcome: Outcome) -> str:
    if outcome.code == ExitCode.STATE_NOT_SAVED:
        return "the state could not be saved"
    return "nothing new had to be saved" if outcome.saved is None else f"the state after step {outcome.saved} is saved"


def fruitless_starts(log: Sequence[events.Event], slurm_job: str, restarts: int, step: int, code: int) -> int:
    """Return how many starts of a job in a row, including the one that ends with `code`, completed no new step.

    A start that SLURM or a user ended from outside does not count. A start that left no trace does: its events could
    not be written, as on a full disk.

    Args:
        restarts: how often SLURM has started the job again.
        step: the last completed step now.
    """
    starts: dict[int, events.BatchStarted] = {}
    ends: dict[int, events.BatchEnded | events.Requeue | events.RequeueRefused] = {}
    for event in log:
        if isinstance(event, events.BatchStarted) and event.slurm_job == slurm_job:
            starts[event.requeues] = event
        elif isinstance(event, events.BatchEnded) and event.slurm_job == slurm_job and starts:
            ends[max(starts)] = event
        elif isinstance(event, events.Requeue | events.RequeueRefused) and event.slurm_job == slurm_job and starts:
            ends.setdefault(max(starts), event)
    codes = {number: end.code for number, end in ends.items() if isinstance(end, events.BatchEnded)} | {restarts: code}
    reached = [*(start.step for start in starts.values()), step][1:]
    last_good, farthest = -1, 0
    for (number, start), after in zip(starts.items(), reached, strict=False):
        farthest = max(farthest, start.step)
        if after > farthest and codes.get(number) != ExitCode.STATE_NOT_SAVED:
            last_good = number
    outside = [
        number
        for number in starts
        if last_good < number < restarts and (number not in ends or ends[number].why == SLURM_ENDS_IT)
    ]
    return restarts - last_good - len(outside)


def handed_over(log: Sequence[events.Event], slurm_job: str) -> events.BatchEnded | None:
    """Return how the job has ended if another node decided so and requeued the job for its script to end it."""
    kinds = events.BatchStarted | events.BatchEnded | events.Requeue
    own = [event for event in log if isinstance(event, kinds) and event.slurm_job == slurm_job]
    if len(own) < 2 or not isinstance(own[-1], events.Requeue):
        return None
    end = own[-2]
    return end if isinstance(end, events.BatchEnded) and end.verdict in ("done", "give up") else None
