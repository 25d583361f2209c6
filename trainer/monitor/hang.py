"""When a step takes too long, and what the reports of the ranks say of it. Pure, and torch-free."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

import msgspec

KNOWN = 3
"""Steps of known duration before there is a deadline: the first ones compile, allocate and connect."""
WINDOW = 32
"""Newest durations that the median is taken of."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A collective, or a message between two ranks, that a rank has begun and not ended."""

    group: str
    operation: str
    number: int
    """Counted by group, from 1: equal on all ranks that take part in the same one."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank stood when its deadline had passed."""

    rank: int
    step: int
    seconds: float
    """Since its last progress."""
    waiting: tuple[Waiting, ...]
    reached: dict[str, int]
    """By group, the number of the newest collective that it has begun."""
    stacks: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What all reports together say."""

    silent: tuple[int, ...]
    """Ranks that wrote none: they are frozen, or their machines are."""
    late: tuple[int, ...]
    """Ranks that have not begun a collective which others wait in."""
    text: str


def deadline(seconds: Sequence[float], *, floor: float, factor: float) -> float | None:
    """Seconds that the next step may take after steps of these durations; None while too few are known."""
    if len(seconds) < KNOWN:
        return None
    return max(floor, factor * statistics.median(seconds[-WINDOW:]))


def was_frozen(waited: float, *, asked: float, floor: float) -> bool:
    """Whether a thread that asked to wait so long was itself stopped meanwhile, as all ranks are by Ctrl-Z.

    What the others did in that time it cannot know, so that its deadline begins anew.
    """
    return waited > asked + floor / 4


def judge(reports: Sequence[Report], ranks: int) -> Verdict:
    """Who keeps the others waiting."""
    answered = {report.rank: report for report in reports}
    silent = tuple(rank for rank in range(ranks) if rank not in answered)
    waiting: dict[Waiting, list[int]] = defaultdict(list)
    for report in reports:
        for one in report.waiting:
            waiting[one].append(report.rank)
    late = tuple(
        sorted(
            rank
            for rank, report in answered.items()
            if any(report.reached.get(one.group, one.number) < one.number for one in waiting)
        )
    )
    parts = [f"{_named(silent)} did not answer: frozen, or the machine is"] if silent else []
    parts += [f"{_named(late)} did not come to what others wait in"] if late else []
    parts += [
        f"{_named(sorted(who))} in {one.operation} number {one.number} of group {one.group}"
        for one, who in sorted(waiting.items(), key=lambda item: (-len(item[1]), item[1]))
    ]
    idle = tuple(sorted(rank for rank, report in answered.items() if not report.waiting and rank not in late))
    parts += [f"{_named(idle)} in no collective"] if idle else []
    longest = max(report.seconds for report in reports)
    step = max(report.step for report in reports)
    text = f"no progress for {longest:.1f} s in step {step + 1}: {'; '.join(parts)}"
    return Verdict(silent=silent, late=late, text=text)


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
