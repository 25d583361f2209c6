"""What came of each fault: from when it happened, the marks of the run and the events of its supervisors. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.drill.faults import Fault
from trainer.goodput import Mark

WHAT = {1: "memory", 2: "decoded", 3: "from disk", 4: "other layout"}
"""The rungs of the recovery ladder, in a word."""
_BY_SOURCE = {"memory": 1, "disk": 3, "nothing": 3}
UNDISTURBED = 2
"""Steps that a session must still complete after a fault to have been undisturbed by it: one may be under way."""


@dataclass(frozen=True, kw_only=True)
class Struck:
    """A fault that was done, at `time` seconds since 1970."""

    fault: Fault
    time: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fault cost."""

    fault: Fault
    rung: int | None = None
    """Of the recovery ladder; None: training went on without a restart."""
    why: str = "training went on"
    steps_lost: int = 0
    """Completed steps that had to be computed again."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase. Phases may overlap or leave gaps."""
    total: float = 0.0
    """Seconds from the fault to the end of the next step."""

    def data(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "fault": str(self.fault),
            "rung": self.rung,
            "steps_lost": self.steps_lost,
            "seconds": {phase: round(value, 3) for phase, value in self.seconds.items()},
            "total_s": round(self.total, 3),
            "why": self.why,
        }


def outcomes(struck: Sequence[Struck], marks: Sequence[Mark], events: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """One for each fault. Faults that fall into one outage share its recovery: each counts from its own moment on."""
    return [_outcome(each, marks, events) for each in struck]


def _outcome(struck: Struck, marks: Sequence[Mark], events: Sequence[Mapping[str, Any]]) -> Outcome:
    before = [mark for mark in marks if mark.time <= struck.time]
    session = before[-1].session if before else 0
    steps = [mark for mark in marks if mark.mark == "step"]
    resumed = next((mark for mark in steps if mark.time > struck.time and mark.session != session), None)
    went_on = [mark for mark in steps if mark.time > struck.time and mark.session == session]
    if struck.fault.target == "disk" or resumed is None or len(went_on) >= UNDISTURBED:
        return Outcome(fault=struck.fault)
    restored = next(mark for mark in marks if mark.session == resumed.session and mark.mark == "restored")
    completed = max((mark.step for mark in steps if mark.session == session), default=0)
    recovery = _after(events, "recovery", struck.time)
    began = _after(events, "began", struck.time, until=resumed.time) or {}
    return Outcome(
        fault=struck.fault,
        rung=recovery.get("rung") if recovery else _BY_SOURCE.get(str(began.get("source"))),
        why=str((recovery or began).get("why") or began.get("reason") or "restarted"),
        steps_lost=max(0, completed - restored.step),
        seconds=_phases(recovery, struck.time, marks, restored, resumed),
        total=resumed.time - struck.time,
    )


def _after(
    events: Sequence[Mapping[str, Any]], kind: str, start: float, until: float = float("inf")
) -> Mapping[str, Any] | None:
    """The last event of a kind up to `until`, or the first one after `start` without an end."""
    found = [event for event in events if event["event"] == kind and start < event["time"] <= until]
    return (found[0] if until == float("inf") else found[-1]) if found else None


def _phases(
    recovery: Mapping[str, Any] | None, struck: float, marks: Sequence[Mark], restored: Mark, resumed: Mark
) -> Mapping[str, float]:
    """As the supervisors measured them; without supervisors what can be seen from outside."""
    if recovery is not None:
        return {phase: float(value) for phase, value in recovery["phases"].items()}
    started = next(mark.time for mark in marks if mark.session == resumed.session and mark.mark == "start")
    started = min(max(started, struck), restored.time)
    return {
        "detect": started - struck,
        "start": restored.time - started,
        "resume": resumed.time - restored.time,
    }
