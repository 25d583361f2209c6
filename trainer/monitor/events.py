"""`RUN/events.jsonl`: the events of a run, one JSON object per line, appended by ranks, supervisors and batch jobs.

Each event is one of the structs below. A line has the struct's fields and `event`, the struct's name in snake_case;
docs/reference.md lists all of them with the docstrings below. Torch-free.
"""

import contextlib
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, Union

import msgspec

from keepwarm import side_writer
from keepwarm.beside import beside
from keepwarm.side_writer import SideWriter
from keepwarm.trainer.job.position import START, Position
from keepwarm.trainer.job.run_folder import RunFolder

PHASES = ("detect", "rendezvous", "start", "fetch", "decode", "verify", "resume")
"""Phases of a recovery, in order."""

Level = Literal["local", "decoded", "disk", "resized"]
"""Level of recovery, by the state that training continues from: `local`, each node's own memory; `decoded`, memory,
with the lost nodes' part decoded by peers; `disk`, the newest checkpoint or else step 0; `resized`, disk, in a
different layout."""
LEVELS: tuple[Level, ...] = ("local", "decoded", "disk", "resized")


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


Number = float | None
"""None when read: not finite, which JSON cannot express."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=_snake_case):
    """Base of all events."""

    time: float = 0.0
    """Seconds since 1970; `append` sets it."""


class TrainingStarted(Event, frozen=True, kw_only=True):
    """All ranks have joined and training begins after `step` steps; `layout` is data, pipeline, tensor.

    `position` has the samples consumed until then, and the stages that have begun.
    """

    step: int
    ranks: int
    layout: tuple[int, int, int]
    position: Position = START


class Began(Event, frozen=True, kw_only=True):
    """The state that training starts from: `source` is `nothing`, `memory` or `disk`; `reason` says why."""

    source: Literal["nothing", "memory", "disk"]
    step: int
    reason: str


class Finished(Event, frozen=True, kw_only=True):
    """The last stage is complete."""

    step: int
    tokens_per_s: Number


class Interrupted(Event, frozen=True, kw_only=True):
    """A signal ended the run after `step` steps, with the state saved."""

    step: int


class Parent(Event, frozen=True, kw_only=True):
    """The run was initialised from the checkpoint or model at `path`; `ledger`: whether its training data are known."""

    path: str
    run: str | None
    step: int | None
    optimizer_state: bool
    ledger: bool


class LrChanged(Event, frozen=True, kw_only=True):
    """The learning-rate schedule of a continued run changes at `step`; `change` is `KEY: OLD -> NEW`."""

    step: int
    change: str


class DataChanged(Event, frozen=True, kw_only=True):
    """A continued run found other content in a source or a validation domain; `change` names it and the effect."""

    step: int
    change: str


class Gate(Event, frozen=True, kw_only=True):
    """A domain was forgotten by more than a stage's gate allows; `before` and `now` are its losses, null if not
    finite."""

    step: int
    stage: str
    domain: str
    action: str
    before: Number
    now: Number


class Skipped(Event, frozen=True, kw_only=True):
    """The update of a step was skipped because the loss or gradient norm, given as text, is not finite."""

    step: int
    loss: str
    grad_norm: str


class Empty(Event, frozen=True, kw_only=True):
    """The update of a step was skipped because every target of its batch is masked."""

    step: int


class Spike(Event, frozen=True, kw_only=True):
    """The loss of a step exceeds `health.spike_factor` times the running mean; numbers are given as text."""

    step: int
    loss: str
    grad_norm: str


class Stopped(Event, frozen=True, kw_only=True):
    """Training stopped itself after `health.max_skipped` consecutive skipped steps; numbers are given as text."""

    step: int
    loss: str
    grad_norm: str


class Straggler(Event, frozen=True, kw_only=True):
    """The rank slows the job down by the factor `ratio`; `share` is the fraction of the time that this costs."""

    step: int
    rank: int
    host: str
    share: Number
    ratio: Number


class Hang(Event, frozen=True, kw_only=True):
    """No rank made progress: `silent` ranks did not answer, others wait for `late` ones; `reports` contains the
    stacks."""

    step: int
    silent: tuple[int, ...]
    late: tuple[int, ...]
    reason: str
    reports: str


class Snapshots(Event, frozen=True, kw_only=True):
    """Totals of this rank's snapshots when it ends: their number, seconds that training waited, size of the
    last one."""

    taken: int
    skipped: int
    blocked_s: float
    last_copy_s: float
    bytes: int


class SnapshotFailed(Event, frozen=True, kw_only=True):
    """No snapshot could be taken after `step`; training continues."""

    step: int
    reason: str


class RedundancyLost(Event, frozen=True, kw_only=True):
    """No snapshot in memory was whole after `step`, as after a lost keeper: one is taken at once, before it is due."""

    step: int


class SnapshotUnlocked(Event, frozen=True, kw_only=True):
    """Snapshot memory of a rank is not page-locked for its GPU: copies pass through small buffers and take longer."""

    step: int
    rank: int
    reason: str


class CheckpointFailed(Event, frozen=True, kw_only=True):
    """No checkpoint could be written after `step`; the next one is tried when it is due, the last one a few times."""

    step: int
    reason: str


class SinkFailed(Event, frozen=True, kw_only=True):
    """An output besides the state, such as a metric sink, a log or the terminal, failed for the first time; training
    continues."""

    sink: str
    reason: str


class OutputLost(Event, frozen=True, kw_only=True):
    """When rank 0 ends: how many writes to an output besides the state were dropped, and why the last one was."""

    output: str
    dropped: int
    reason: str


class Recovery(Event, frozen=True, kw_only=True):
    """Training continues after a failure: the level of recovery, the slots that failed, the bytes of data that nodes
    decoded, and the seconds of each phase."""

    level: Level
    why: str
    slots: tuple[int, ...]
    source: Literal["nothing", "memory", "disk"]
    step: int
    bytes_decoded: int
    phases: dict[str, float]


class SupervisorStarted(Event, frozen=True, kw_only=True):
    """A node's supervisor started, for a layout of `slots` nodes."""

    node: str
    slots: int


class SupervisorEnded(Event, frozen=True, kw_only=True):
    """A node's supervisor exited with this exit code."""

    node: str
    code: int
    why: str


class Failure(Event, frozen=True, kw_only=True):
    """Something failed in these slots. `kind`: a node was `lost`, its `gpu` is broken, a worker was `killed`, `failed`
    or `hung`, its `agent` or the `store` died.
    """

    node: str
    kind: Literal["lost", "gpu", "killed", "failed", "hung", "agent", "store"]
    cause: str
    slots: tuple[int | None, ...]


class Whole(Event, frozen=True, kw_only=True):
    """The node of `slots` again holds every chunk of the committed snapshot: full redundancy is restored."""

    node: str
    slots: tuple[int | None, ...]
    epoch: int
    step: int


class NodeDrained(Event, frozen=True, kw_only=True):
    """A node left the run because it was asked to, without a loss; others have its `slots`."""

    host: str
    slots: tuple[int, ...]


class NodeExcluded(Event, frozen=True, kw_only=True):
    """The run continues without a node. `slurm_job` is set if the batch job decided it, rather than the supervisor."""

    host: str
    why: str
    slurm_job: str | None = None


class MemoryKept(Event, frozen=True, kw_only=True):
    """Before a run shrinks or grows: the snapshot of `step` is complete in memory, including the state of the lost
    `slots`, and stays there until the next layout has committed; `room` says what both layouts need."""

    node: str
    step: int
    slots: tuple[int, ...]
    room: str


class MemoryNotKept(Event, frozen=True, kw_only=True):
    """Before a run shrinks or grows: the next layout cannot read the state from memory, and does so from disk."""

    node: str
    why: str


class MemorySaved(Event, frozen=True, kw_only=True):
    """Before a run shrinks, or after its next layout could not read it from memory: the snapshot of `step` is on disk,
    including the state of the lost `slots`."""

    node: str
    step: int
    slots: tuple[int, ...]


class MemoryNotSaved(Event, frozen=True, kw_only=True):
    """As `memory_saved`, but the state in memory could not be written to disk; the newest checkpoint is used."""

    node: str
    why: str
    slots: tuple[int, ...]


class Resized(Event, frozen=True, kw_only=True):
    """The run continues with a different number of slots, from the memory of the layout before or from disk."""

    node: str
    slots: int
    why: str


class BatchStarted(Event, frozen=True, kw_only=True):
    """A batch job started on these nodes, after this many requeues, when `step` steps had been recorded."""

    slurm_job: str
    nodes: tuple[str, ...]
    requeues: int
    step: int = 0


class BatchEnded(Event, frozen=True, kw_only=True):
    """The ranks of a batch job ended with this exit code; `verdict` is the next action."""

    slurm_job: str
    code: int
    verdict: Literal["done", "again", "requeue", "cancel", "give up"]
    why: str


class Requeue(Event, frozen=True, kw_only=True):
    """A batch job was requeued without the `excluded` nodes."""

    slurm_job: str
    why: str
    excluded: tuple[str, ...]


class RequeueRefused(Event, frozen=True, kw_only=True):
    """The batch system refused to requeue a batch job, which ends instead; `why` is its answer."""

    slurm_job: str
    why: str


KINDS: dict[str, type[Event]] = {_snake_case(kind.__name__): kind for kind in Event.__subclasses__()}
"""All events by the name used in the log."""
_DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Union[tuple(KINDS.values())])  # noqa: UP007

E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class EventLog:
    """The events of a run, oldest first."""

    events: tuple[Event, ...]
    unknown: int = 0
    """Lines with events unknown to this version, or without the fields that it expects."""

    def of(self, *kinds: type[E]) -> list[E]:
        """Return the events of these kinds, oldest first."""
        return [event for event in self.events if isinstance(event, kinds)]


def now(event: Event) -> Event:
    """Return an event with the current time."""
    return msgspec.structs.replace(event, time=time.time())


def record(folder: Path, event: Event) -> None:
    """Append an event with the current time, beside the work of this process: see `keepwarm.beside`."""
    with side_writer.attempt(RunFolder(folder).events_file.name):
        beside().do(partial(append, folder, now(event)))


def append(folder: Path, event: Event) -> None:
    """Append one line to the log of a run folder, with the current time unless the event has one.

    One that cannot be written is dropped.

    Each line is a single write: lines of several processes do not mix on a local or a POSIX shared file system.
    """
    writer = SideWriter(RunFolder(folder).events_file)
    writer.write(msgspec.json.encode(event if event.time else now(event)))
    writer.close()


def size(folder: Path) -> int:
    """Return the length of the log in bytes, for a later `read` of what is added."""
    with contextlib.suppress(FileNotFoundError):
        return RunFolder(folder).events_file.stat().st_size
    return 0


def read(folder: Path, *, start: int = 0) -> EventLog:
    """Read the log of a run folder from a byte on; empty if there is no file. Skips lines that are not JSON, such as
    torn ones.
    """
    events: list[Event] = []
    unknown = 0
    with contextlib.suppress(FileNotFoundError), RunFolder(folder).events_file.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            try:
                events.append(decode(line))
            except msgspec.ValidationError:
                unknown += 1
            except msgspec.DecodeError:
                continue
    return EventLog(tuple(events), unknown)


def decode(line: bytes) -> Event:
    """Return the event in one line.

    Raises msgspec.DecodeError if the line is not JSON, and its subclass ValidationError if the event is unknown.
    """
    return _DECODER.decode(line)
