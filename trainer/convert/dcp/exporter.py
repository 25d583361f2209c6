"""Export a native checkpoint of any layout to torch's DCP, torchtitan or Megatron Core, with the optimizer state."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from keepwarm.files import sync_file
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.format.manifest import MANIFEST
from keepwarm.trainer.convert.dcp.writer import write_dcp
from keepwarm.trainer.convert.dialects import COMMON, DIALECTS, MODEL, MOMENTS, STEP, Chunk, Theirs, sections
from keepwarm.trainer.convert.huggingface.exporter import check_tensors, model_spec_of
from keepwarm.trainer.convert.huggingface.folder import NOTE, dump_config
from keepwarm.trainer.convert.huggingface.importer import Progress, silent
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.convert.output_folder import new_folder, write_file
from keepwarm.trainer.convert.recipes import Recipe
from keepwarm.trainer.convert.streaming import Maker
from keepwarm.trainer.convert.whole import Whole
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.spec import ModelSpec

_FLOAT_STEP = "optimizer.step as F32"


class NativeUnits:
    """The tensors of a checkpoint as `keepwarm.trainer.convert.whole.Units`, one unit each."""

    def __init__(self, native: NativeCheckpoint) -> None:
        self._native = native

    def dtype(self, name: str) -> str:
        return "F32" if name == _FLOAT_STEP else self._native.dtype(name)

    def unit_bytes(self, name: str) -> int:
        return 4 if name == _FLOAT_STEP else self._native.tensors[name].bytes

    def unit(self, name: str, index: int) -> Bytes:
        if name == _FLOAT_STEP:
            return np.array([step_of(self._native)], "<f4").view(np.uint8)
        out = np.empty(self._native.tensors[name].bytes, np.uint8)
        self._native.read(name, 0, out)
        return out


def to_dcp(
    source: Path,
    destination: Path,
    *,
    kind: str,
    dtype: str | None = None,
    weights_only: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the folder `destination`; return a summary, including what was not converted.

    Args:
        kind: a name in `keepwarm.trainer.convert.dialects.DIALECTS`.
        weights_only: leave the optimizer state behind.

    Raises:
        SpecError: the format cannot express this model; names the field.
        CheckpointError: a tensor or file is missing, left over, damaged or does not fit; names it.
        OutputError: `destination` exists or cannot be written; nothing is left there.
    """
    dialect = DIALECTS[kind]
    with new_folder(destination) as tmp, NativeCheckpoint(source, scratch=tmp) as native:
        spec = model_spec_of(native)
        check_tensors(native, spec)
        moments = () if weights_only else moments_of(native)
        if moments and dtype is not None:
            raise SpecError("--dtype converts weights alone; add --weights-only")
        theirs = dialect.out(spec)
        tensors = sections(theirs, dialect, moments)
        if moments:
            tensors += _steps(kind, theirs)
        size = write_dcp(tmp, tensors, Maker(Whole(NativeUnits(native)), dtype), progress)
        if kind == "megatron":
            _write_megatron(tmp, native.manifest.step, step_of(native) if moments else None)
        write_file(tmp / NOTE, dump_config(note_of(native, spec, kind)))
        taken = {run[0] for tensor in tensors for chunk in tensor.chunks for run in chunk.recipe.runs}
        left = sorted(set(native.tensors) - taken - {STEP})
    return {
        "source": str(native.path),
        "destination": str(destination),
        "model_type": kind,
        "tensors": len(tensors),
        "parameters": sum(chunk.recipe.elements for tensor in theirs if not tensor.is_copy for chunk in tensor.chunks),
        "bytes": size,
        "dtypes": sorted(
            {native.tensors[name].dtype for name in taken & set(native.tensors)} if not dtype else [dtype]
        ),
        "moments": list(moments),
        "carried": [],
        "left": left,
    }


def step_of(native: NativeCheckpoint) -> int:
    """Return the number of optimizer updates. Raises `CheckpointError` if the checkpoint does not record it."""
    if STEP not in native.tensors:
        raise CheckpointError(f"{native.path}: {STEP} is missing; --weights-only leaves the optimizer behind")
    out = np.empty(native.tensors[STEP].bytes, np.uint8)
    native.read(STEP, 0, out)
    return int(out.view("<i8")[0])


def moments_of(native: NativeCheckpoint) -> tuple[str, ...]:
    """Return the optimizer moments that exist for every parameter; raise if one exists only for some."""
    parameters = [name.removeprefix(MODEL) for name in native.tensors if name.startswith(MODEL)]
    found = []
    for moment in (*MOMENTS, "momentum"):
        lost = [name for name in parameters if f"optimizer.{moment}.{name}" not in native.tensors]
        if lost and len(lost) < len(parameters):
            raise CheckpointError(
                f"{native.path}: optimizer.{moment}.{lost[0]} is missing; --weights-only leaves the optimizer behind"
            )
        if not lost:
            found.append(moment)
    return tuple(found)


def _steps(kind: str, theirs: list[Theirs]) -> list[Theirs]:
    """Add the number of updates to the format's tensors: once, or for every parameter."""
    names, source = {"dcp": ([STEP], STEP), "megatron": ([], STEP)}.get(
        kind, ([f"optimizer.state.{tensor.name}.step" for tensor in theirs if not tensor.is_copy], _FLOAT_STEP)
    )
    made = []
    for name in names:
        recipe = Recipe(name=name, shape=(), runs=((source, 0, 1),))
        made.append(Theirs(name=name, shape=(), chunks=(Chunk(offsets=(), recipe=recipe),)))
    return made


def _write_megatron(folder: Path, iteration: int, step: int | None) -> None:
    """Write the files that Megatron Core needs besides DCP's: its back-ends' names, and state that is not sharded."""
    common: dict[str, Any] = {"iteration": iteration, "checkpoint_version": 3.0}
    if step is not None:
        common["optimizer"] = {"optimizer": {"param_groups": [{"step": step}]}}
    torch.save(common, folder / COMMON)
    sync_file(folder / COMMON)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_file(
        folder / "metadata.json", dump_config(backends | {"common_backend": "torch", "common_backend_version": 1})
    )


def note_of(native: NativeCheckpoint, spec: ModelSpec, kind: str) -> dict[str, Any]:
    """Return what an export records about itself and its parent, so that it can be imported unchanged."""
    manifest = native.manifest
    return {
        "format": kind,
        "model": spec.model_dump(mode="json"),
        "run": manifest.run,
        "epoch": manifest.epoch,
        "step": manifest.step,
        "meta": manifest.meta,
        "parent": {
            "format": "native",
            "path": str(native.path.resolve()),
            "hash": xxhash.xxh3_128_hexdigest((native.path / MANIFEST).read_bytes()),
            "run": manifest.run,
            "epoch": manifest.epoch,
            "step": manifest.step,
        },
    }
