"""Starting from another run of ours, or from any native checkpoint: its weights, its optimizer state, what it saw.

Nothing is ever written into the parent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ft import durable
from ft.errors import FtError
from parallel.model import ModelParts
from parallel.shard import Shard
from trainer import checkpoint
from trainer.data.ledger import Ledger
from trainer.errors import CheckpointError
from trainer.spec import JobSpec

MODEL, OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True, kw_only=True)
class Parent:
    """What a run begins with."""

    record: dict[str, Any]
    """Path, run, step and whether weights alone were taken, saved with the run."""
    ledger: Ledger | None
    """With the parent's stages as its past; None where the parent has none."""


def adopt(job: JobSpec, model: ModelParts, shards: Mapping[str, Shard], tokenizer: str | None) -> Parent:
    """Fill the shards from `job.init_from`; the caller then calls `Engine.restored`.

    The optimizer state is taken too, when the first stage keeps it and the parent has one.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of another architecture or tokenizer.
    """
    assert job.init_from is not None
    path = _newest(Path(job.init_from))
    try:
        manifest = durable.read_manifest(path)
    except FtError as error:
        raise CheckpointError(f"init_from: {error}") from error
    stored = {entry.piece.name: entry.piece.global_shape for part in manifest.parts for entry in part.entries}
    _check_architecture(path, stored, _shapes(model))
    meta = manifest.meta
    theirs = meta.get("run", {}).get("tokenizer")
    if None not in (theirs, tokenizer) and theirs != tokenizer:
        raise CheckpointError(f"init_from: {path} was trained with another tokenizer than the data of this job")
    keeps = job.stages[0].optimizer_state == "keep" and any(name.startswith(OPTIMIZER) for name in stored)
    if keeps:
        taken = (MODEL, OPTIMIZER)
        checkpoint.load(path, {name: shard for name, shard in shards.items() if name.startswith(taken)})
    else:
        checkpoint.load_weights(path, shards)
    record = {"path": str(path), "run": manifest.run, "step": manifest.step, "optimizer_state": keeps}
    saved = meta.get("ledger")
    ledger = None if saved is None else Ledger.load(saved).continued(manifest.run)
    return Parent(record=record | {"ledger": ledger is not None}, ledger=ledger)


def _newest(path: Path) -> Path:
    """A checkpoint itself, or the newest of a run folder or a folder of checkpoints."""
    if (path / durable.MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (newest := durable.latest(folder)) is not None:
            return newest
    raise CheckpointError(
        f"init_from: {path}: neither a checkpoint nor a run folder with a complete one; "
        "Hugging Face models are converted first"
    )


def _shapes(model: ModelParts) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        whole = model.part(range(model.layers), embed=True, head=True)
    return {MODEL + model.canonical(name): tuple(value.shape) for name, value in whole.named_parameters()}


def _check_architecture(
    path: Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    found = {name: shape for name, shape in stored.items() if name.startswith(MODEL)}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            theirs, ours = (shapes.get(name, "nothing of that name") for shapes in (found, expected))
            raise CheckpointError(
                f"init_from: {path} is of another architecture: {name} is {theirs} there, {ours} in this job's model"
            )
