"""What a run folder holds, to compare two runs by."""

import json
from pathlib import Path
from typing import Any

from keepwarm.ft.format import publication


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without the times. One that is being written does not count."""
    whole, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")
    lines = map(json.loads, whole.splitlines())
    return [{key: value for key, value in line.items() if key != "step_time_s"} for line in lines]


def tensors_of(folder: Path) -> dict[object, str]:
    """Checksum of every stored piece of the newest checkpoint, after all bytes were verified against them."""
    newest = publication.latest(folder / "checkpoints")
    assert newest is not None
    manifest = publication.verify(newest)
    pieces = [(entry.piece, entry.xxh3) for part in manifest.parts for entry in part.entries]
    return {(piece.name, piece.offsets, piece.flat): checksum for piece, checksum in pieces}
