"""Import a checkpoint of DCP, torchtitan, Megatron Core or DeepSpeed, with the optimizer state."""

import argparse
import dataclasses
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import ITEM_SIZE, Piece
from keepwarm.ft.format.writer import write_part_blocks
from keepwarm.trainer.convert.dcp.folder import DcpFolder
from keepwarm.trainer.convert.deepspeed.folder import DeepSpeedFolder, names_of
from keepwarm.trainer.convert.dialects import (
    COMMON,
    DIALECTS,
    MODEL,
    MOMENTS,
    STEP,
    Dialect,
    as_found,
    per_layer,
    with_moments,
)
from keepwarm.trainer.convert.dtypes import NAMES
from keepwarm.trainer.convert.huggingface.config import config_for
from keepwarm.trainer.convert.huggingface.folder import NOTE, strict_json_file
from keepwarm.trainer.convert.huggingface.importer import Progress, silent, whole_piece
from keepwarm.trainer.convert.output_folder import new_folder
from keepwarm.trainer.convert.recipes import Recipe
from keepwarm.trainer.convert.streaming import Maker
from keepwarm.trainer.convert.whole import Folder, Whole
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.job.files import load_model
from keepwarm.trainer.model.families.tensor_names import is_constant
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from keepwarm.trainer.model.spec import ModelSpec, stored_model_spec

_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
_NOT_THE_MODEL = ("optimizer.", "random.", "rng_state", "dataloader", "lr_scheduler", "train_state", "rerun_state")
"""Prefixes of tensors that may be ignored."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How a foreign checkpoint is read."""

    config: Path | None = None
    """A config.json or model spec that describes the model; not needed for what keepwarm exported."""
    dtype: str | None = None
    """Type of the weights, as the safetensors format names it; None: as stored."""
    weights_only: bool = False
    """Leave the optimizer state behind."""
    trust_pickle: bool = False
    """See `DcpFolder`."""
    ignored_keys: tuple[str, ...] = ()
    """Fields of a config.json that change nothing, which keepwarm does not know."""


def from_dcp(
    source: Path,
    destination: Path,
    *,
    kind: str,
    options: ImportOptions = ImportOptions(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the checkpoint folder `destination`; return a summary, including what was not converted.

    `kind` is a name in `keepwarm.trainer.convert.dialects.DIALECTS`, or deepspeed.

    Raises:
        SpecError: the model cannot be described, or not in this format.
        CheckpointError: a tensor or file is missing, left over, damaged or does not fit; names it.
        OutputError: `destination` exists or cannot be written; nothing is left there.
    """
    note = strict_json_file(source / NOTE) if (source / NOTE).is_file() else {}
    spec, dtype, trust_pickle = spec_of(options, note, source), options.dtype, options.trust_pickle
    folder: Folder
    if kind == "deepspeed":
        folder = DeepSpeedFolder(source, trust_pickle=trust_pickle)
        dialect = names_of(model_type_of(options.config, note, spec))
    else:
        folder = DcpFolder(source, trust_pickle=trust_pickle)
        dialect = as_found(DIALECTS[kind], spec, folder.tensors)
    recipes, masters = _recipes(folder, dialect, kind, spec, options.weights_only)
    moments = () if options.weights_only else _moments(folder, dialect, recipes)
    if moments and dtype is not None:
        raise SpecError("--dtype converts weights alone; add --weights-only")
    step = _step(folder, kind, source, trust_pickle) if moments else None
    weights = _with_masters(recipes, dialect) if masters else recipes
    wanted = {MODEL + recipe.name: recipe for recipe in weights}
    wanted |= {recipe.name: recipe for recipe in with_moments(recipes, dialect, moments)}
    meta = _meta(note, spec, source, kind, bool(moments))
    run, epoch, at = str(note.get("run", source.resolve().name)), 0, step or 0
    if moments:
        epoch, at = int(note.get("epoch", 0)), int(note.get("step", at))
    with new_folder(destination) as tmp:
        size = _write(tmp, Maker(Whole(folder), dtype), wanted, step, progress)
        publication.write_manifest(
            tmp, publication.Identity(run=run, epoch=epoch, step=at, layout="whole"), ranks=1, meta=meta
        )
    taken = {name for recipe in wanted.values() for name, *_ in recipe.runs}
    return {
        "source": str(source),
        "destination": str(destination),
        "model_type": kind,
        "tensors": len(wanted),
        "parameters": sum(recipe.elements for recipe in recipes),
        "bytes": size,
        "dtypes": sorted({folder.dtype(name) for name in taken} if dtype is None else {dtype}),
        "moments": list(moments),
        "carried": [],
        "left": sorted(name for name in set(folder.tensors) - taken if step is None or not name.endswith(".step"))
        + sorted(folder.objects),
    }


def spec_of(options: ImportOptions, note: dict[str, Any], source: Path) -> ModelSpec:
    """Return the model of a foreign checkpoint, from `options.config` or the note of an export.

    Raises:
        SpecError: neither describes it.
    """
    config = options.config
    if config is None:
        if "model" not in note:
            raise SpecError(f"{source} does not say what the model is: give --config with a config.json or model spec")
        try:
            return stored_model_spec(note["model"])
        except ValueError as error:
            raise SpecError(f"{source / NOTE}: model: {error}") from error
    if config.suffix == ".json":
        fields = strict_json_file(config)
        if "model_type" in fields:
            try:
                return model_spec_from_hf_config(fields, options.ignored_keys)
            except SpecError as error:
                raise SpecError(f"{config}: {str(error).removeprefix('config.json: ')}") from error
    return load_model(config)


def model_type_of(config: Path | None, note: dict[str, Any], spec: ModelSpec) -> str:
    """Return the Hugging Face model type whose names the parameters have."""
    fields = strict_json_file(config) if config is not None and config.suffix == ".json" else {}
    return str(fields.get("model_type") or note.get("model_type") or config_for(spec)["model_type"])


def _recipes(
    folder: Folder, dialect: Dialect, kind: str, spec: ModelSpec, weights_only: bool
) -> tuple[list[Recipe], bool]:
    """Return recipes of the parameters, checked against the folder, and whether full-precision weights exist."""
    recipes = dialect.into(spec)
    apart = any(name.startswith("decoder.layers.0.") for name in folder.tensors)
    if apart:
        recipes = per_layer(recipes, spec)
    shapes = _their_shapes(dialect, spec, folder, apart)
    for name, shape in shapes.items():
        found = folder.shape(name)
        padded = name in _PADDED and found[:1] >= shape[:1] and found[1:] == shape[1:]
        if found != shape and not padded:
            raise CheckpointError(f"{folder.path}: {name} is {list(found)}, the model spec says {list(shape)}")
        _check_dtype(folder, name)
    unplaced = sorted(
        name
        for name in folder.tensors
        if name not in shapes and not name.startswith(_NOT_THE_MODEL) and not is_constant(name, folder.dtype(name))
    )
    if unplaced:
        raise CheckpointError(
            f"{folder.path}: {unplaced[0]} has no place in the model or this format ({len(unplaced)} such)"
        )
    masters = (
        not weights_only
        and dialect.master is not None
        and all(dialect.master + name in folder.tensors for name in shapes)
    )
    if isinstance(folder, DcpFolder) and kind == "megatron" and not apart:
        for name in folder.tensors:
            if ".decoder.layers." in f".{name}":
                folder.stack(name)
    return recipes, masters


def _their_shapes(dialect: Dialect, spec: ModelSpec, folder: Folder, apart: bool) -> dict[str, tuple[int, ...]]:
    shapes = {
        tensor.name: tensor.shape for tensor in dialect.out(spec) if not tensor.is_copy or tensor.name in folder.tensors
    }
    if not apart:
        return shapes
    return {
        name.replace("decoder.layers.", f"decoder.layers.{index}."): (
            shape[1:] if name.startswith("decoder.layers.") else shape
        )
        for name, shape in shapes.items()
        for index in range(spec.layers)
    }


def _moments(folder: Folder, dialect: Dialect, recipes: list[Recipe]) -> tuple[str, ...]:
    """Return the moments that exist for every parameter; raise if one exists only for some."""
    names = sorted({name for recipe in recipes for name, *_ in recipe.runs})
    found = []
    for moment in (*MOMENTS, "momentum"):
        there = [name for name in names if dialect.moment(moment, name) in folder.tensors]
        if there and len(there) < len(names):
            lost = next(name for name in names if name not in there)
            raise CheckpointError(
                f"{folder.path}: {dialect.moment(moment, lost)} is missing; --weights-only leaves the optimizer behind"
            )
        if there:
            found.append(moment)
        for name in there:
            _check_dtype(folder, dialect.moment(moment, name))
    return tuple(found)


def _check_dtype(folder: Folder, name: str) -> None:
    if folder.dtype(name) not in ("F64", *NAMES):
        raise CheckpointError(
            f"{folder.path}: {name} is of dtype {folder.dtype(name)}, only F64, {', '.join(NAMES)} can be"
        )


def _with_masters(recipes: list[Recipe], dialect: Dialect) -> list[Recipe]:
    assert dialect.master is not None
    prefix = dialect.master
    return [
        dataclasses.replace(recipe, runs=tuple((prefix + name, a, b) for name, a, b in recipe.runs))
        for recipe in recipes
    ]


def _step(folder: Folder, kind: str, source: Path, trust_pickle: bool) -> int:
    """Return the number of optimizer updates."""
    if kind == "megatron":
        return _common_step(source / COMMON, trust_pickle)
    if isinstance(folder, DeepSpeedFolder):
        steps = {float(step) for step in folder.steps()}
    else:
        names = [STEP] if kind == "dcp" else [name for name in folder.tensors if name.endswith(".step")]
        steps = {folder.number(name) for name in names if name in folder.tensors}
    if len(steps) != 1:
        raise CheckpointError(
            f"{folder.path}: {len(steps)} different step counts of the optimizer; --weights-only leaves it behind"
        )
    return int(steps.pop())


def _common_step(file: Path, trust_pickle: bool) -> int:
    """Return the update count of Megatron's optimizer, or else the iteration."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            common = torch.load(file, map_location="cpu", weights_only=not trust_pickle)
        for groups in _param_groups(common.get("optimizer")):
            if "step" in groups:
                return int(groups["step"])
        return int(common["iteration"])
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; --weights-only does not need it") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{file}: a pickle of more than plain values, which could run code: take the weights alone with "
            "--weights-only, or add --trust-pickle for a file you made yourself"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: says no iteration; --weights-only leaves the optimizer behind") from error


def _param_groups(saved: Any) -> list[dict[str, Any]]:
    """Return the parameter groups in a Megatron optimizer's state, nested one or two levels deep."""
    for _ in range(2):
        if isinstance(saved, dict) and "optimizer" in saved:
            saved = saved["optimizer"]
    groups = saved.get("param_groups", []) if isinstance(saved, dict) else []
    return [group for group in groups if isinstance(group, dict)]


def _meta(note: dict[str, Any], spec: ModelSpec, source: Path, kind: str, complete: bool) -> dict[str, Any]:
    kept = dict(note.get("meta", {})) if complete else {}
    if not complete:
        kept |= {"weights_only": True, "note": "model weights alone: no optimizer state, no ledger"}
    return kept | {
        "model": spec.model_dump(mode="json"),
        "parent": {"format": kind, "path": str(source.resolve())},
    }


def _write(tmp: Path, maker: Maker, recipes: dict[str, Recipe], step: int | None, progress: Progress) -> int:
    pieces = [whole_piece(name, recipe, maker) for name, recipe in recipes.items()]
    total, done = sum(piece.bytes for piece in pieces), 0

    def blocks(piece: Piece) -> Iterator[Any]:
        nonlocal done
        if piece.name == STEP:
            yield np.array([step], "<i8").view(np.uint8)
            return
        for block in maker.blocks(recipes[piece.name]):
            yield block
            done += len(block)
            progress(done, total)

    if step is not None:
        pieces.append(Piece(name=STEP, global_shape=(), offsets=(), shape=(), dtype="I64"))
    pieces.sort(key=lambda piece: -ITEM_SIZE[piece.dtype])
    try:
        return write_part_blocks(tmp, 0, pieces, blocks).data_bytes
    except FtError as error:
        raise CheckpointError(str(error)) from error
