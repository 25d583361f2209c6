"""What came of each fault: from when it happened, the marks of the run and the events of its supervisors. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepwarm.launch.drill.faults import Fault
from keepwarm.trainer.monitor.events import Began, EventLog, Level, Recovery
from keepwarm.trainer.monitor.goodput import Mark

_BY_SOURCE: dict[str, Level] = {"memory": "local", "disk": "disk", "nothing": "disk"}
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
    level: Level | None = None
    """Of the recovery; None: training went on without a restart."""
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
            "level": self.level,
            "steps_lost": self.steps_lost,
            "seconds": {phase: round(value, 3) for phase, value in self.seconds.items()},
            "total_s": round(self.total, 3),
            "why": self.why,
        }


def outcomes(struck: Sequence[Struck], marks: Sequence[Mark], log: EventLog) -> list[Outcome]:
    """One for each fault. Faults that fall into one outage share its recovery: each counts from its own moment on."""
    return [_outcome(each, marks, log) for each in struck]


def _outcome(struck: Struck, marks: Sequence[Mark], log: EventLog) -> Outcome:
    before = [mark for mark in marks if mark.time <= struck.time]
    session = before[-1].session if before else 0
    steps = [mark for mark in marks if mark.mark == "step"]
    resumed = next((mark for mark in steps if mark.time > struck.time and mark.session != session), None)
    went_on = [mark for mark in steps if mark.time > struck.time and mark.session == session]
    if struck.fault.target == "disk" or resumed is None or len(went_on) >= UNDISTURBED:
        return Outcome(fault=struck.fault)
    restored = next(mark for mark in marks if mark.session == resumed.session and mark.mark == "restored")
    completed = max((mark.step for mark in steps if mark.session == session), default=0)
    recovery = next((event for event in log.of(Recovery) if event.time > struck.time), None)
    began = next((event for event in reversed(log.of(Began)) if struck.time < event.time <= resumed.time), None)
    return Outcome(
        fault=struck.fault,
        level=recovery.level if recovery else _BY_SOURCE[began.source] if began else None,
        why=recovery.why if recovery else began.reason if began else "restarted",
        steps_lost=max(0, completed - restored.step),
        seconds=_phases(recovery, struck.time, marks, restored, resumed),
        total=resumed.time - struck.time,
    )


def _phases(
    recovery: Recovery | None, struck: float, marks: Sequence[Mark], restored: Mark, resumed: Mark
) -> Mapping[str, float]:
    """As the supervisors measured them; without supervisors what can be seen from outside."""
    if recovery is not None:
        return recovery.phases
    started = next(mark.time for mark in marks if mark.session == resumed.session and mark.mark == "start")
    started = min(max(started, struck), restored.time)
    return {
        "detect": started - struck,
        "start": restored.time - started,
        "resume": resumed.time - restored.time,
    }
