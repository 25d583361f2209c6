"""The position of a run: what it has consumed, and the stages that it has begun. Pure and torch-free.

A step number alone means nothing across a continuation: with another batch, sequence length or budget, the same number
of steps has consumed something else. Stages, curves, mixtures and boundaries of what is left therefore follow from the
samples and tokens that were consumed, and stages that were left keep the boundaries that they had.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.job.sections import StageSpec

if TYPE_CHECKING:  # NumPy would make every reading of a job slower
    from keepwarm.trainer.data.ledger import Ledger


class StageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that has begun, as the training state saves it."""

    name: str
    start_step: int
    """Steps of the run completed before it."""
    curve_step: int
    """Step of the run at which step 0 of its curve lies."""
    spec: dict[str, Any] = {}
    """Its section of the job when it was trained last."""


class BegunStage(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that has begun, with what it has consumed."""

    name: str
    start_step: int
    """Steps of the run completed before it."""
    start_sample: int
    """Samples of the run consumed before it."""
    tokens: int
    """Tokens that it has consumed so far, including replayed ones."""


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run has come."""

    step: int = 0
    """Completed steps, including skipped ones."""
    samples: int = 0
    """Consumed samples."""
    stages: tuple[BegunStage, ...] = ()
    """Stages that have begun, in order; the last one is in progress, or ends here."""


START = Position()


def saved_spec(stage: StageSpec) -> dict[str, Any]:
    """Return the section of a stage as `StageRecord.spec` keeps it."""
    return stage.model_dump(mode="json", by_alias=True)


def position_at(step: int, records: Sequence[StageRecord], ledger: "Ledger") -> Position:
    """Return the position of a run; the ledger says what was consumed."""
    starts = {mark.name: mark.start for mark in ledger.stages}
    begins = [starts[record.name] for record in records]
    ends = [*begins[1:], ledger.position]
    stages = (
        BegunStage(
            name=record.name,
            start_step=record.start_step,
            start_sample=begin,
            tokens=ledger.tokens_between(begin, end),
        )
        for record, begin, end in zip(records, begins, ends, strict=False)
    )
    return Position(step=step, samples=ledger.position, stages=tuple(stages))


def stage_records(run: Mapping[str, Any], ledger: "Ledger") -> list[StageRecord]:
    """Return the stages that have begun, from the saved state of a run.

    Earlier versions saved none: their stages follow from the ledger and from the ends of the saved curves.

    Raises:
        CheckpointError: the records are damaged, or do not agree with the ledger.
    """
    begun = [mark.name for mark in ledger.stages if mark.start < ledger.position]
    try:
        if "stages" in run:
            records = msgspec.convert(run["stages"], list[StageRecord])
        else:
            starts = [0]
            for curve in run["curves"]:
                starts.append(starts[-1] + int(curve["end"]))
            records = [
                StageRecord(name=name, start_step=at, curve_step=at) for name, at in zip(begun, starts, strict=False)
            ]
    except (msgspec.ValidationError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the saved state has no usable record of its stages: {error}") from None
    if [record.name for record in records] != begun:
        raise CheckpointError(
            f"the saved state has begun the stages {[record.name for record in records]}, its data ledger {begun}"
        )
    return records


def check_continues(stages: Sequence[StageSpec], records: Sequence[StageRecord], position: Position) -> None:
    """Raise SpecError with a line for everything in `stages` that contradicts what was already trained."""
    problems = list(_order(stages, records))
    if not problems and records:
        for record, stage in zip(records[:-1], stages, strict=False):
            problems += _left(record, stage)
        problems += _in_progress(records[-1], stages[len(records) - 1], position.stages[-1].tokens)
    if problems:
        raise SpecError("\n".join(problems))


def _order(stages: Sequence[StageSpec], records: Sequence[StageRecord]) -> Iterator[str]:
    for index, record in enumerate(records):
        if index >= len(stages) or stages[index].name != record.name:
            found = f"is {stages[index].name!r}" if index < len(stages) else "is missing"
            yield f"stages.{index} {found}, but this run has trained {record.name!r} there: keep stages that have begun"
            return


def _left(record: StageRecord, stage: StageSpec) -> Iterator[str]:
    for key, before, now in _changes(record, stage):
        yield (
            f"stages.{record.name}.{key}: {before} -> {now}: the run has left this stage, so it keeps what it was "
            "trained with; add a stage instead"
        )


def _in_progress(record: StageRecord, stage: StageSpec, consumed: int) -> Iterator[str]:
    for key, before, now in _changes(record, stage):
        if key == "tokens" and stage.tokens < consumed:
            yield (
                f"stages.{record.name}.tokens: {before} -> {now}: {consumed:,} tokens of it are trained already; "
                f"{consumed} ends the stage here"
            )
        elif key in ("skip", "optimizer_state"):
            yield f"stages.{record.name}.{key}: {before} -> {now}: this applies at the start of a stage, which is over"


def _changes(record: StageRecord, stage: StageSpec) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, recorded and present value; keys that only one version of keepwarm knows are left out."""
    for key, value in saved_spec(stage).items():
        if key in record.spec and record.spec[key] != value:
            yield key, record.spec[key], value
