"""Export a native checkpoint of any layout to a DeepSpeed universal checkpoint, which every ZeRO stage can load."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from keepwarm.files import sync_directory, sync_file
from keepwarm.tested import TESTED
from keepwarm.trainer.convert.dcp.exporter import NativeUnits, moments_of, note_of, step_of
from keepwarm.trainer.convert.deepspeed.folder import (
    COUNTER,
    LATEST,
    SPLIT_DIM,
    STATE,
    TENSOR,
    VOCABULARY,
    WEIGHT,
    ZERO,
)
from keepwarm.trainer.convert.dialects import MODEL, MOMENTS
from keepwarm.trainer.convert.huggingface.config import config_for
from keepwarm.trainer.convert.huggingface.exporter import check_tensors, model_spec_of
from keepwarm.trainer.convert.huggingface.folder import CONFIG, NOTE, dump_config
from keepwarm.trainer.convert.huggingface.importer import FILES, Progress, silent
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.convert.output_folder import new_folder, write_file
from keepwarm.trainer.convert.recipes import Recipe, into_huggingface
from keepwarm.trainer.convert.streaming import Maker
from keepwarm.trainer.convert.whole import Whole
from keepwarm.trainer.errors import SpecError

_SPLIT_ALONG_INPUTS = (".attention.output.weight", ".mlp.down.weight")
_VOCABULARY = ("embedding.weight", "head.weight")


def to_deepspeed(
    source: Path,
    destination: Path,
    *,
    model_type: str | None = None,
    weights_only: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the folder `destination`, which DeepSpeed's `load_checkpoint` takes with `load_universal`.

    Parameters have the names of the Hugging Face class `model_type`, or of the parent's or the first one that fits.
    Returns what was done, with what was left behind.

    Raises:
        SpecError: no Hugging Face class computes this model; names the field. Or the optimizer is not AdamW.
        CheckpointError: a tensor or file is missing, left over, damaged or does not fit; names it.
        OutputError: `destination` exists or cannot be written; nothing is left there.
    """
    with new_folder(destination) as tmp, NativeCheckpoint(source, scratch=tmp) as native:
        spec = model_spec_of(native)
        check_tensors(native, spec)
        parent = (native.manifest.meta.get(FILES) or {}).get("config") or {}
        config = config_for(spec, model_type or parent.get("model_type"))
        model_type = str(config["model_type"])
        moments = () if weights_only else moments_of(native)
        if set(moments) - set(MOMENTS):
            raise SpecError(f"optimizer.{moments[0]}: DeepSpeed's format is AdamW's; add --weights-only")
        recipes = into_huggingface(spec, model_type)
        maker = Maker(Whole(NativeUnits(native)), "F32")
        step = step_of(native) if moments else None
        folder = tmp / f"global_step{native.manifest.step}_universal"
        total = 4 * sum(recipe.elements for recipe in recipes) * (1 + len(moments))
        size = 0
        for recipe in recipes:
            for written in _write_parameter(folder / ZERO / recipe.name, maker, recipe, moments, step):
                size += written
                progress(size, total)
        _write_counters(folder, native.manifest.step, step, len(recipes))
        sync_directory(folder / ZERO)
        sync_directory(folder)
        write_file(tmp / LATEST, folder.name.encode())
        write_file(tmp / CONFIG, dump_config(config))
        write_file(tmp / NOTE, dump_config(note_of(native, spec, "deepspeed") | {"model_type": model_type}))
        taken = (MODEL, *(f"optimizer.{moment}." for moment in (*moments, *((COUNTER,) if moments else ()))))
        left = sorted(name for name in native.tensors if not f"{name}.".startswith(taken))
    return {
        "source": str(native.path),
        "destination": str(destination),
        "model_type": "deepspeed",
        "tensors": len(recipes) * (1 + len(moments)),
        "parameters": sum(recipe.elements for recipe in recipes),
        "bytes": size,
        "dtypes": ["F32"],
        "moments": list(moments),
        "carried": [],
        "left": left,
    }


def _write_parameter(
    place: Path, maker: Maker, recipe: Recipe, moments: Sequence[str], step: int | None
) -> Iterator[int]:
    """Write the folder of one parameter; yield the bytes of its weight and of each moment once they are written."""
    place.mkdir(parents=True)
    for key in (WEIGHT, *moments):
        yield _write(place / f"{key}.pt", maker, recipe, MODEL if key == WEIGHT else f"optimizer.{key}.")
    if step is not None:
        _save(place / f"{COUNTER}.pt", torch.tensor(float(step)))
    sync_directory(place)


def _write(file: Path, maker: Maker, recipe: Recipe, prefix: str) -> int:
    ours = dataclasses.replace(recipe, runs=tuple((prefix + name, a, b) for name, a, b in recipe.runs))
    tensor = torch.empty(recipe.shape, dtype=torch.float32)
    memory, at = tensor.reshape(-1).view(torch.uint8).numpy(), 0
    for block in maker.blocks(ours):
        memory[at : at + len(block)] = block
        at += len(block)
    name = recipe.runs[0][0]
    entry: dict[str, Any] = {TENSOR: tensor, SPLIT_DIM: int(name.endswith(_SPLIT_ALONG_INPUTS))}
    _save(file, entry | ({VOCABULARY: True} if name in _VOCABULARY else {}))
    return at


def _write_counters(folder: Path, iteration: int, step: int | None, parameters: int) -> None:
    """Write the engine state besides the tensors. Learning rates and weight decay come from the engine's own config."""
    written_for = TESTED["deepspeed"].highest
    # As many groups as an optimizer can have; it uses only those that it needs.
    groups: list[dict[str, Any]] = [{} for _ in range(parameters)]
    state = {0: {} if step is None else {"step": torch.tensor(float(step))}}
    common = {"ds_version": written_for, "param_groups": groups}
    _save(folder / ZERO / STATE, common | {"optimizer_state_dict": {"state": state, "param_groups": groups}})
    counters: dict[str, Any] = {
        "module": {},
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": iteration,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": written_for,
    }
    # ZeRO 3 reads its counters under a different name.
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(folder / file, counters)


def _save(file: Path, content: Any) -> None:
    torch.save(content, file)
    sync_file(file)
