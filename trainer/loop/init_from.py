"""Initialise a run from a run folder, a native checkpoint (also at a URL) or a Hugging Face folder.

Takes the weights and, where available, the optimizer state and the training history. Never writes into the parent.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import MANIFEST, read_manifest
from keepwarm.parallel.model import ModelParts
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint import checkpoint
from keepwarm.trainer.checkpoint.copy import find
from keepwarm.trainer.checkpoint.store import opened
from keepwarm.trainer.convert.huggingface.folder import CONFIG
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.tokenizer import tokenizer_hash
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.errors import CheckpointError, TrainerError
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.url import is_url
from keepwarm.trainer.model.spec import ModelSpec

MODEL, OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The initial state of a run."""

    record: dict[str, Any]
    """Path, run, step and whether only weights were loaded; saved with the run."""
    ledger: Ledger | None
    """With the parent's stages as history; None if the parent has none."""


def adopt(job: JobSpec, model: ModelParts, shards: Mapping[str, Shard], tokenizer: str | None, world: World) -> Parent:
    """Fill the shards from `job.init_from`; the caller must then call `Engine.restored`. Collective.

    Also loads the optimizer state, if the first stage keeps it and the parent has one. A Hugging Face folder is
    converted into the run's own folder and removed after loading.

    Raises:
        CheckpointError: there is no complete checkpoint, or its architecture or tokenizer differs.
    """
    assert job.init_from is not None
    if is_url(job.init_from):
        try:
            url = find(job.init_from)
        except (FtError, CheckpointError, OSError) as error:
            raise CheckpointError(f"init_from: {error}") from error
        return _adopt(job, url, model, shards, tokenizer)
    origin = Path(job.init_from)
    if (origin / CONFIG).is_file():
        with _converted(origin, job, world) as path:
            _check_computation(origin, read_manifest(path).meta["model"], job)
            _check_tokenizer(origin, tokenizer)
            parent = _adopt(job, path, model, shards, tokenizer)
        return replace(parent, record=parent.record | {"path": str(origin)})
    return _adopt(job, _newest(origin), model, shards, tokenizer)


def _adopt(
    job: JobSpec, path: Path | str, model: ModelParts, shards: Mapping[str, Shard], tokenizer: str | None
) -> Parent:
    try:
        with opened(path) as parent:
            manifest = parent.manifest
    except FtError as error:
        raise CheckpointError(f"init_from: {error}") from error
    stored = {entry.piece.name: entry.piece.global_shape for part in manifest.parts for entry in part.entries}
    _check_architecture(path, stored, _shapes(model))
    meta = manifest.meta
    theirs = meta.get("run", {}).get("tokenizer")
    if None not in (theirs, tokenizer) and theirs != tokenizer:
        raise CheckpointError(f"init_from: {path} was trained with a tokenizer other than that of this job's data")
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


@contextlib.contextmanager
def _converted(origin: Path, job: JobSpec, world: World) -> Iterator[Path]:
    """Convert a Hugging Face folder to a native checkpoint on rank 0; remove it on exit."""
    target = Path(job.output) / "parent"
    failure: TrainerError | None = None
    if world.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        try:
            model = None if isinstance(job.model, ModelSpec) else job.model
            from_huggingface(origin, target, ignored_keys=job.init_from_ignore_keys, model=model)
        except TrainerError as error:
            failure = error
    if world.any(failure is not None):
        raise CheckpointError(f"init_from: {failure or f'{origin} could not be converted on rank 0'}")
    try:
        yield target
    finally:
        world.barrier()
        if world.rank == 0:
            shutil.rmtree(target, ignore_errors=True)


_COMPUTED_WITH = (
    "norm", "norm_eps", "norm_position", "activation", "position", "rotary_fraction", "parallel_residual", "qk_norm",
    "nope_layers",
)  # fmt: skip
"""Model fields that do not affect shapes but that the weights depend on. Others may be changed on purpose."""


def _check_computation(origin: Path, theirs: Mapping[str, Any], job: JobSpec) -> None:
    if not isinstance(job.model, ModelSpec):
        return  # compared by the conversion
    ours = job.model.model_dump(mode="json")
    for key in _COMPUTED_WITH:
        if ours[key] != theirs.get(key, ours[key]):
            raise CheckpointError(
                f"init_from: {origin} has another architecture: model.{key} is {theirs[key]} there, {ours[key]} here"
            )


def _check_tokenizer(origin: Path, tokenizer: str | None) -> None:
    file = origin / "tokenizer.json"
    if tokenizer is None or not file.is_file():
        return
    if tokenizer_hash(file) != tokenizer:
        raise CheckpointError(f"init_from: {file} differs from the tokenizer of this job's data")


def _newest(path: Path) -> Path:
    """Return the path itself if it is a checkpoint, else the newest checkpoint in a run folder or checkpoint folder."""
    if (path / MANIFEST).is_file():
        return path
    for folder in (RunFolder(path).checkpoints, path):
        if folder.is_dir() and (newest := publication.latest(folder)) is not None:
            return newest
    raise CheckpointError(
        f"init_from: {path}: neither a checkpoint nor a run folder with a complete one, nor a Hugging Face folder "
        f"({CONFIG})"
    )


def _shapes(model: ModelParts) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        whole = model.build_stage(range(model.layers), embed=True, head=True)
    tensors = (*whole.named_parameters(), *whole.named_buffers())
    return {MODEL + model.canonical(name): tuple(value.shape) for name, value in tensors}


def _check_architecture(
    path: Path | str, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    stored = {name: shape for name, shape in stored.items() if name.startswith(MODEL)}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            theirs, ours = (shapes.get(name, "nothing of that name") for shapes in (stored, expected))
            raise CheckpointError(
                f"init_from: {path} has another architecture: {name} is {theirs} there, {ours} in this job's model"
            )
