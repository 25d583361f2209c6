"""Derive the cost of each fault from its time, the run's marks and the supervisors' events. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepwarm.launch.drill.faults import Fault
from keepwarm.trainer.monitor.events import Began, EventLog, Level, Recovery
from keepwarm.trainer.monitor.goodput import Mark

_BY_SOURCE: dict[str, Level] = {"memory": "local", "disk": "disk", "nothing": "disk"}
UNDISTURBED = 2
"""Steps that a session must complete after a fault to count as undisturbed; one step may already be in progress."""


@dataclass(frozen=True, kw_only=True)
class Struck:
    """A fault injected at `time`, in Unix time."""

    fault: Fault
    time: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Cost of a fault."""

    fault: Fault
    level: Level | None = None
    """Recovery level; None if training continued without a restart."""
    why: str = "training went on"
    steps_lost: int = 0
    """Completed steps that had to be recomputed."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Duration of each phase. Phases may overlap or leave gaps."""
    total: float = 0.0
    """Seconds from the fault to the end of the next step."""

    def data(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "fault": str(self.fault),
            "level": self.level,
            "steps_lost": self.steps_lost,
            "seconds": {phase: round(value, 3) for phase, value in self.seconds.items()},
            "total_s": round(self.total, 3),
            "why": self.why,
        }


def outcomes(struck: Sequence[Struck], marks: Sequence[Mark], log: EventLog) -> list[Outcome]:
    """Return one outcome per fault. Faults in the same outage share its recovery, each measured from its own time."""
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
    """Return the phases measured by supervisors or, without supervisors, those observable from outside."""
    if recovery is not None:
        return recovery.phases
    started = next(mark.time for mark in marks if mark.session == resumed.session and mark.mark == "start")
    started = min(max(started, struck), restored.time)
    return {
        "detect": started - struck,
        "start": restored.time - started,
        "resume": resumed.time - restored.time,
    }
