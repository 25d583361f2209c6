"""Decide when a step takes too long, and which ranks the reports blame. Pure and torch-free."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

import msgspec

KNOWN = 3
"""Number of step times needed before there is a deadline: the first steps compile, allocate and connect."""
WINDOW = 32
"""Number of newest step times that the median is taken over."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A collective, or a point-to-point message, that a rank has begun and not finished."""

    group: str
    operation: str
    number: int
    """Counted per group, from 1: equal on all ranks that take part."""
    message: bool = False
    """Between two ranks; counted apart from collectives."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """State of a rank when its deadline expired."""

    rank: int
    step: int
    seconds: float
    """Time since its last progress."""
    waiting: tuple[Waiting, ...]
    reached: dict[str, int]
    """By group, the number of the newest collective that the rank has begun."""
    stacks: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Conclusion from all reports."""

    silent: tuple[int, ...]
    """Ranks without a report: frozen, or on frozen machines."""
    late: tuple[int, ...]
    """Ranks that have not begun a collective in which others wait, without those that wait in another one themselves,
    unless all do; without any, those that wait for nothing while others wait for messages."""
    text: str
    at_fault: tuple[int, ...] = ()
    """Ranks whose nodes are to blame: those that are silent, else those that are late and wait for nothing. Empty if
    there are none, as where ranks wait for one another."""


def deadline(seconds: Sequence[float], *, floor: float, factor: float) -> float | None:
    """Return the seconds allowed for the next step, given earlier step times; None while there are too few."""
    if len(seconds) < KNOWN:
        return None
    return max(floor, factor * statistics.median(seconds[-WINDOW:]))


def was_frozen(waited: float, *, asked: float, floor: float) -> bool:
    """Return whether a thread that wanted to wait `asked` seconds was itself stopped, as all ranks are by Ctrl-Z.

    It cannot know what the other ranks did meanwhile, so its deadline starts over.
    """
    return waited > asked + floor / 4


def judge(reports: Sequence[Report], ranks: int) -> Verdict:
    """Determine which ranks keep the others waiting."""
    answered = {report.rank: report for report in reports}
    silent = tuple(rank for rank in range(ranks) if rank not in answered)
    waiting: dict[Waiting, list[int]] = defaultdict(list)
    for report in reports:
        for collective in report.waiting:
            waiting[collective].append(report.rank)
    missing = [
        rank
        for rank, report in sorted(answered.items())
        if any(not entry.message and report.reached.get(entry.group, entry.number) < entry.number for entry in waiting)
    ]
    stuck = tuple(rank for rank in missing if not answered[rank].waiting)
    what = "collective that others wait in"
    if not missing and any(entry.message for entry in waiting):
        stuck = tuple(rank for rank, report in sorted(answered.items()) if not report.waiting)
        what = "message that others wait for"
    late = stuck or tuple(missing)
    parts = [f"{_named(silent)} did not answer: the process or its machine is frozen"] if silent else []
    parts += [f"{_named(late)} did not reach a {what}"] if late else []
    parts += [
        f"{_named(sorted(members))} in {entry.operation} number {entry.number} of group {entry.group}"
        for entry, members in sorted(waiting.items(), key=lambda item: (-len(item[1]), item[1]))
    ]
    idle = tuple(sorted(rank for rank, report in answered.items() if not report.waiting and rank not in late))
    parts += [f"{_named(idle)} in no collective"] if idle else []
    longest = max(report.seconds for report in reports)
    step = max(report.step for report in reports)
    text = f"no progress for {longest:.1f} s in step {step + 1}: {'; '.join(parts)}"
    return Verdict(silent=silent, late=late, text=text, at_fault=silent or stuck)


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
