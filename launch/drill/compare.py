"""Compare two runs of a job for bitwise equality."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.launch.errors import DrillError
from keepwarm.trainer.job.run_folder import RunFolder

SHOWN = 3
"""Maximum number of differences listed per kind."""


def differences(one: Path, other: Path) -> list[str]:
    """Return the differences in losses, rates, norms and final state of two finished runs; empty if all are equal.

    Verifies every stored byte against its checksum first.

    Raises:
        DrillError: one of the runs has no complete checkpoint, or a damaged one.
    """
    return [*_first(_of_steps(_steps(one), _steps(other))), *_first(_of_state(_state(one), _state(other)))]


def _first(found: Iterator[str]) -> list[str]:
    lines = list(found)
    more = [f"and {len(lines) - SHOWN} more of that kind"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def _steps(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times, the only values in which equal runs differ."""
    lines = RunFolder(folder).metrics()
    return [{key: value for key, value in line.items() if key != "step_time_s"} for line in lines]


def _of_steps(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> Iterator[str]:
    if len(one) != len(other):
        yield f"{len(one)} lines of metrics and {len(other)}"
    for mine, theirs in zip(one, other, strict=False):
        for key in mine.keys() | theirs.keys():
            if mine.get(key) != theirs.get(key):
                yield f"step {mine['step']}: {key} {mine.get(key)!r} and {theirs.get(key)!r}"


Place = tuple[str, tuple[int, ...], tuple[int, int] | None]
"""Name, offsets and flat range of a piece; optimizers take several ranges of one tensor slice."""


def _state(folder: Path) -> dict[Place, str]:
    """Return the checksum of every piece of the newest checkpoint."""
    newest = publication.latest(RunFolder(folder).checkpoints)
    if newest is None:
        raise DrillError(f"{folder}: the run has left no complete checkpoint to compare")
    try:
        manifest = publication.verify(newest)
    except FtError as error:
        raise DrillError(f"{newest}: cannot be compared: {error}") from error
    pieces = [(entry.piece, entry.xxh3) for part in manifest.parts for entry in part.entries]
    return {(piece.name, piece.offsets, piece.flat): checksum for piece, checksum in pieces}


def _of_state(one: dict[Place, str], other: dict[Place, str]) -> Iterator[str]:
    for place in sorted(one.keys() | other.keys(), key=lambda place: (*place[:2], place[2] or ())):
        if one.get(place) != other.get(place):
            name, offsets, flat = place
            elements = "" if flat is None else f", elements {flat[0]} to {flat[1]}"
            yield f"{name} at {offsets}{elements}: other bytes"
