"""Goodput accounting: assign every second of a run to productive work, snapshot stalls, lost work, detection, recovery,
start-up or evaluation.

Rank 0 appends one line to `RUN/goodput.jsonl` whenever it moves from one kind of work to another. Lines are never
changed, so a restart loses none, and the result is a pure function of these lines and of the failures that supervisors
recorded in `events.jsonl`. Torch-free.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from keepwarm import side_writer
from keepwarm.beside import beside
from keepwarm.files import READABLE, atomic_write
from keepwarm.side_writer import SideWriter
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.monitor import events

Kind = Literal["productive", "snapshot stall", "lost work", "detection", "recovery", "start-up", "evaluation"]
KINDS: tuple[Kind, ...] = (
    "productive",
    "snapshot stall",
    "lost work",
    "detection",
    "recovery",
    "start-up",
    "evaluation",
)


class Mark(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the file: the work that ended at `time` (seconds since 1970), or the start of a process."""

    time: float
    mark: Literal["start", "restored", "step", "evaluation", "save", "end"]
    session: int
    """The process that wrote the line. A newer session overrides an older one that was frozen and resumed."""
    step: int = 0
    """Completed steps."""
    stalled: float = 0.0
    """Seconds that this session has waited for snapshots so far."""
    restart: bool = False
    """With `start`: a launcher restarted the ranks after a failure."""


@dataclass(frozen=True, slots=True)
class Outage:
    """A failure as seen by a supervisor: when it was detected, and how many seconds after it happened."""

    noticed: float
    detection: float


@dataclass(frozen=True, slots=True)
class Span:
    """An interval in seconds since 1970. `kind` None: the run was stopped; excluded from its wall time."""

    start: float
    stop: float
    kind: Kind | None
    step: int | None = None
    """The step that the interval completed or followed."""
    completes: bool = False
    """Whether it ended with a completed step."""

    @property
    def seconds(self) -> float:
        return self.stop - self.start


class Timeline:
    """Rank 0's writer; does nothing on other ranks."""

    def __init__(self, folder: Path, *, rank: int, began: float, restart: bool, fresh: bool) -> None:
        """`began`: start time of this process; `fresh`: discard the records of an earlier run in the folder."""
        # A frozen process that resumes and its successor write to the same file: lines must not mix.
        path = RunFolder(folder).timeline_file
        self._name, self._file = path.name, SideWriter(path, fresh=fresh) if rank == 0 else None
        self._session = time.time_ns()
        self._start: float | None = began
        if restart:
            self._write_start(restart=True)

    def restored(self, step: int) -> None:
        """Record that training begins after `step` completed steps."""
        # Not earlier: a start that a user asked for and that is refused leaves the run as it was.
        self._write_start(restart=False)
        self._write("restored", step=step)

    def step(self, step: int, stalled: float) -> None:
        """Record a completed step; `stalled`: seconds waited for snapshots since this process began."""
        self._write("step", step=step, stalled=stalled)

    def evaluation(self, step: int) -> None:
        """Record the end of an evaluation after `step` steps."""
        self._write("evaluation", step=step)

    def save(self, step: int) -> None:
        """Record that workers were asked for checkpoints; the time since then counts as snapshot stall."""
        self._write("save", step=step)

    def close(self, step: int, *, ended: bool) -> None:
        """Record the end of the session. `ended`: with the state saved, rather than by a failure."""
        if ended:
            self._write("end", step=step)
        if self._file is not None:
            self._beside(self._file.close)
            self._file = None

    def _write_start(self, *, restart: bool) -> None:
        if self._start is not None:
            self._write("start", at=self._start, restart=restart)
            self._start = None

    def _write(self, mark: Any, *, at: float | None = None, **values: Any) -> None:
        if self._file is not None:
            line = Mark(time=time.time() if at is None else at, mark=mark, session=self._session, **values)
            self._beside(partial(self._file.write, msgspec.json.encode(line)))

    def _beside(self, work: Callable[[], object]) -> None:
        with side_writer.attempt(self._name):
            beside().do(work)


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Time of a run by kind, up to its last mark."""

    seconds: dict[Kind, float]
    stopped: float = 0.0
    """Seconds between a stop and a continuation by a user; excluded from the wall time."""
    steps: int = 0
    """Completed steps whose work was kept."""
    steps_lost: int = 0
    """Steps that had to be computed again."""
    restarts: int = 0

    @property
    def wall(self) -> float:
        """The sum of all kinds."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Fraction of the wall time that was productive; 0 for a run that has not begun."""
        return self.seconds["productive"] / self.wall if self.wall else 0.0

    def data(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "goodput": self.share,
            "wall_s": self.wall,
            "seconds": dict(self.seconds),
            "stopped_s": self.stopped,
            "steps": self.steps,
            "steps_lost": self.steps_lost,
            "restarts": self.restarts,
        }

    def text(self) -> str:
        """Return one line; omits kinds that took no time."""
        parts = [f"{kind} {seconds:.1f} s" for kind, seconds in self.seconds.items() if seconds >= 0.05]
        return f"goodput: {self.share:.1%} of {self.wall:.1f} s: " + " | ".join(parts)


def goodput(marks: Iterable[Mark], outages: Sequence[Outage] = ()) -> Goodput:
    """Sum up the intervals of `spans`."""
    marks = list(marks)
    intervals = spans(marks, outages)
    seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    for span in intervals:
        if span.kind is not None:
            seconds[span.kind] += span.seconds
    return Goodput(
        seconds=seconds,
        stopped=sum((span.seconds for span in intervals if span.kind is None), 0.0),
        steps=sum(span.completes and span.kind == "productive" for span in intervals),
        steps_lost=sum(span.completes and span.kind == "lost work" for span in intervals),
        restarts=sum(mark.mark == "start" and mark.restart for mark in marks),
    )


def process_start() -> float:
    """Return the start time of this process in seconds since 1970, with a resolution of 0.01 s."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def spans(marks: Iterable[Mark], outages: Sequence[Outage] = ()) -> list[Span]:
    """Assign every second from the first mark to the last to exactly one span, oldest first.

    Work is lost if a later session begins before it: its steps, and the work right after them, become `lost work`, as
    does work in progress when the failure happened. A failure without a recorded outage is taken to have happened when
    the next process began.
    """
    account = _Account(outages=sorted(outages, key=lambda outage: outage.noticed))
    for mark in marks:
        account.take(mark)
    return account.spans


@dataclass
class _Account:
    """Walks through the marks; time is accounted for up to `now`."""

    outages: Sequence[Outage]
    spans: list[Span] = field(default_factory=list)
    now: float | None = None
    session: int = -1
    state: Literal["starting", "training", "ended"] = "ended"
    starting: Kind = "start-up"
    stalled: float = 0.0

    def take(self, mark: Mark) -> None:
        if mark.mark == "start":
            self._start(mark)
        elif mark.session == self.session:
            self._close(mark)

    def _start(self, mark: Mark) -> None:
        if self.now is None:
            self.now = mark.time
        elif self.state == "ended" or not mark.restart:
            self._until(mark.time, None)
            self.starting = "start-up"
        else:
            self._failure(mark.time)
        self.session, self.state, self.stalled = mark.session, "starting", 0.0

    def _failure(self, started: float) -> None:
        """Account for the time from a failed session's last mark to the start of the next session."""
        assert self.now is not None
        before = self.now
        outage = next((outage for outage in self.outages if before < outage.noticed <= started), Outage(started, 0.0))
        self._until(outage.noticed - outage.detection, "lost work" if self.state == "training" else self.starting)
        self._until(outage.noticed, "detection")
        self._until(started, "recovery")
        self.starting = "recovery"

    def _close(self, mark: Mark) -> None:
        if mark.mark == "restored":
            self._until(mark.time, self.starting)
            self._lose(mark.step)
            self.state = "training"
        elif mark.mark == "step":
            assert self.now is not None
            stall = min(max(mark.stalled - self.stalled, 0.0), max(mark.time - self.now, 0.0))
            self.stalled = mark.stalled
            self._until(self.now + stall, "snapshot stall", mark.step)
            self._until(mark.time, "productive", mark.step, completes=True)
        elif mark.mark == "evaluation":
            self._until(mark.time, "evaluation", mark.step)
        elif mark.mark == "save":
            self._until(mark.time, "snapshot stall", mark.step)
        else:
            self._until(mark.time, "start-up")
            self.state = "ended"

    def _until(self, stop: float, kind: Kind | None, step: int | None = None, *, completes: bool = False) -> None:
        """Account for the time up to `stop`; adds nothing if the clock was set back."""
        assert self.now is not None
        stop = max(stop, self.now)
        if stop > self.now or completes:
            self.spans.append(Span(self.now, stop, kind, step, completes))
        self.now = stop

    def _lose(self, step: int) -> None:
        """Restart after `step` steps: later work was done again, including the evaluation at `step`."""
        for at, span in enumerate(self.spans):
            again = span.step is not None and (span.step > step or (span.step == step and span.kind == "evaluation"))
            if again:
                self.spans[at] = Span(span.start, span.stop, "lost work", span.step, span.completes)


def read_marks(folder: Path) -> Iterator[Mark]:
    """Yield the marks of a run folder, oldest first; skips torn lines. Empty if there is no file."""
    with contextlib.suppress(FileNotFoundError), RunFolder(folder).timeline_file.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError):
                yield msgspec.json.decode(line, type=Mark)


def read_outages(folder: Path) -> list[Outage]:
    """Read the failures that supervisors recorded: `failure` events, with the detection time of the next `recovery`."""
    outages: list[Outage] = []
    pending: list[float] = []
    for event in events.read(folder).of(events.Failure, events.Recovery):
        if isinstance(event, events.Failure):
            pending.append(event.time)
        elif isinstance(event, events.Recovery) and pending:
            # Failures that needed no restart are distinguished by their detection time.
            outages += [Outage(noticed, event.phases.get("detect", 0.0)) for noticed in pending]
            pending.clear()
    return [*outages, *(Outage(noticed, 0.0) for noticed in pending)]


def of_run(folder: Path) -> Goodput:
    """Return the goodput of the run in a folder, up to now."""
    return goodput(read_marks(folder), read_outages(folder))


def write_result(folder: Path) -> Goodput:
    """Store the goodput as `goodput.json`, if the disk has room, and return it."""
    result, path = of_run(folder), RunFolder(folder).goodput_file
    with side_writer.attempt(path.name):
        atomic_write(path, (json.dumps(result.data()) + "\n").encode(), mode=READABLE)
    return result
