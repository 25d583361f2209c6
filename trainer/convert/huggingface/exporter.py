"""The weights of a native checkpoint, of any layout, to a Hugging Face folder. Without torch."""

import contextlib
import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import xxhash

from keepwarm.ft.format.manifest import MANIFEST
from keepwarm.trainer.convert.dtypes import NAMES
from keepwarm.trainer.convert.huggingface.config import config_for, fits, in_both_dialects, with_dtype
from keepwarm.trainer.convert.huggingface.folder import CONFIG, INDEX, NOTE, SINGLE, dump_config, strict_json_file
from keepwarm.trainer.convert.huggingface.importer import FILES, Progress, carry, file_sum, silent
from keepwarm.trainer.convert.huggingface.passed_on import PassedOn, passed_on
from keepwarm.trainer.convert.huggingface.tokenizer import CARRIED, run_file, write_tokenizer
from keepwarm.trainer.convert.native import PREFIX, NativeCheckpoint
from keepwarm.trainer.convert.output_folder import new_folder, write_file
from keepwarm.trainer.convert.recipes import Recipe, into_huggingface
from keepwarm.trainer.convert.safetensors_file import write_tensors
from keepwarm.trainer.convert.streaming import Maker
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.any_spec import AnyModelSpec, stored_any_model_spec
from keepwarm.trainer.model.shapes import stored_shapes
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.model.transformers.composite import text_of

SHARD_BYTES = 5 * 10**9
"""Default size at which a file is full, as in transformers 4."""

_CARRIED_NAME = re.compile(r"[^/\\\0.][^/\\\0]*")


def to_huggingface(
    source: Path, destination: Path, *, dtype: str | None = None, max_shard_bytes: int = SHARD_BYTES,
    model_type: str | None = None, progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write the model folder `destination`; returns what was done, with what was left behind.

    `source` is a checkpoint, or a folder of them, of which the newest is taken. The config is that of the model's
    Hugging Face parent where it still describes the model, else made for `model_type` or the first type that fits.

    Raises:
        SpecError: no Hugging Face class computes this model; names the field.
        CheckpointError: a tensor or file is missing, left over, damaged or does not fit; names it.
        OutputError: `destination` exists or cannot be written; nothing is left there.
    """
    with contextlib.ExitStack() as stack:
        tmp = stack.enter_context(new_folder(destination))
        native = stack.enter_context(NativeCheckpoint(source, scratch=tmp))
        spec = any_model_spec_of(native)
        check_tensors(native, spec)
        others = stack.enter_context(passed_on(native, spec))
        parent = native.manifest.meta.get(FILES) or {}
        config = _config(spec, parent, model_type, others)
        maker = Maker(native, dtype)
        recipes = _recipes(spec, config, parent)
        if others is not None:
            recipes = {others.layout.placed(name): recipe for name, recipe in recipes.items()}
        stored = Counter[str]()
        for recipe in recipes.values():
            stored[maker.dtype(recipe)] += maker.bytes(recipe)
        main = stored.most_common(1)[0][0]
        if dtype is not None or not (config.get("dtype") or config.get("torch_dtype")):
            config = with_dtype(config, main)
        if isinstance(spec, ModelSpec):
            config = in_both_dialects(config, spec)
        sizes = {name: maker.bytes(recipe) for name, recipe in recipes.items()}
        sizes |= {name: stored.size for name, stored in (others.tensors.items() if others else ())}
        shards = _shards(sizes, max_shard_bytes)
        _write(tmp, maker, recipes, others, shards, progress)
        carried = _carry(native.path, parent, tmp, others)
        left = sorted(name for name in native.tensors if not name.startswith(PREFIX))
        if not set(carried) & set(CARRIED):
            files, fields, without = write_tokenizer(native, tmp, spec.max_sequence_length)
            carried, left = carried + files, left + without
            config |= {name: value for name, value in fields.items() if config.get(name) is None}
        write_file(tmp / CONFIG, dump_config(config))
        write_file(tmp / NOTE, dump_config(_note(native)))
    return {
        "source": str(native.path),
        "destination": str(destination),
        "model_type": config["model_type"],
        "tensors": len(sizes),
        "passed_on": sorted(others.tensors) if others else [],
        "parameters": sum(recipe.elements for recipe in recipes.values()),
        "bytes": stored.total(),
        "dtypes": sorted(stored),
        "files": list(shards),
        "carried": carried,
        "left": left,
    }


def any_model_spec_of(native: NativeCheckpoint) -> AnyModelSpec:
    """The model in a checkpoint: from its manifest, or from the `run.json` of the run that it lies in.

    Raises:
        CheckpointError: neither says so.
    """
    fields, origin = native.manifest.meta.get("model"), native.path / MANIFEST
    if fields is None:
        origin = run_file(native)
        if not origin.is_file():
            raise CheckpointError(f"{native.path}: {MANIFEST} does not describe the model, and {origin} is missing")
        fields = strict_json_file(origin).get("model")
    try:
        return stored_any_model_spec(fields)
    except ValueError as error:
        raise CheckpointError(f"{origin}: model: {error}") from error


def model_spec_of(native: NativeCheckpoint) -> ModelSpec:
    """As `any_model_spec_of`, for what only keepwarm's own decoder can be turned into.

    Raises:
        CheckpointError: neither says so, or the model's layers come from transformers.
    """
    spec = any_model_spec_of(native)
    if not isinstance(spec, ModelSpec):
        raise CheckpointError(
            f"{native.path}: its layers are those of transformers ({spec.description.class_name}): it can be trained "
            "on, and exported with keepwarm convert --to hf, and nothing else yet"
        )
    return spec


def check_tensors(native: NativeCheckpoint, spec: AnyModelSpec) -> None:
    """Raise `CheckpointError` unless the parameters are those of the model, and no others."""
    shapes = {PREFIX + name: shape for name, shape in stored_shapes(spec).items()}
    for name, shape in shapes.items():
        if name not in native.tensors:
            raise CheckpointError(f"{native.path}: {name} is missing")
        tensor = native.tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(f"{native.path}: {name} is {list(tensor.shape)}, the model spec says {list(shape)}")
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{native.path}: {name} is of dtype {tensor.dtype}, only {', '.join(NAMES)} can be")
    unplaced = sorted(name for name in native.tensors if name.startswith(PREFIX) and name not in shapes)
    if unplaced:
        raise CheckpointError(f"{native.path}: {unplaced[0]} has no place in the model ({len(unplaced)} such)")


def _config(
    spec: AnyModelSpec, parent: dict[str, Any], model_type: str | None, others: PassedOn | None
) -> dict[str, Any]:
    if not isinstance(spec, ModelSpec):
        if model_type not in (None, spec.model_type):
            raise SpecError(f"model_type {model_type!r}: the layers are those of {spec.description.class_name}")
        if others is not None:
            return dict(spec.config)
        return {**text_of(spec.config), "architectures": [spec.description.class_name]}
    config = parent.get("config")
    if config and model_type in (None, config["model_type"]):
        if fits(config, spec, parent.get("ignored_keys", ())):
            return dict(config)
        model_type = str(config["model_type"])
    return config_for(spec, model_type)


def _recipes(spec: AnyModelSpec, config: dict[str, Any], parent: dict[str, Any]) -> dict[str, Recipe]:
    recipes = {recipe.name: recipe for recipe in into_huggingface(spec, str(config["model_type"]))}
    if spec.tied_embeddings and parent.get("config", {}).get("model_type") == config["model_type"]:
        embedding = next(recipe for recipe in recipes.values() if recipe.runs[0][0] == "embedding.weight")
        for name in parent.get("tied_head", []):
            recipes[name] = dataclasses.replace(embedding, name=name)
    return {
        name: dataclasses.replace(recipe, runs=tuple((PREFIX + run[0], *run[1:]) for run in recipe.runs))
        for name, recipe in recipes.items()
    }


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File names and the tensors in each: in order, a new file where the next tensor would pass the limit."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{at:05d}-of-{len(groups):05d}.safetensors": group for at, group in enumerate(groups, start=1)}


def _write(
    tmp: Path,
    maker: Maker,
    recipes: dict[str, Recipe],
    others: PassedOn | None,
    shards: dict[str, list[str]],
    progress: Progress,
) -> None:
    passed = {} if others is None else others.tensors
    total, done = sum(maker.bytes(recipe) for recipe in recipes.values()) + sum(s.size for s in passed.values()), 0
    kinds = {name: (maker.dtype(recipe), recipe.shape) for name, recipe in recipes.items()}
    kinds |= {name: (stored.dtype, stored.shape) for name, stored in passed.items()}

    with maker.ahead(recipes[name] for names in shards.values() for name in names if name in recipes) as take:

        def blocks(name: str) -> Any:
            nonlocal done
            for block in take(recipes[name]) if others is None or name in recipes else others.blocks(name):
                yield block
                done += len(block)
                progress(done, total)

        for file, names in shards.items():
            write_tensors(tmp / file, {name: kinds[name] for name in names}, blocks)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_size": total,
                "total_parameters": sum(math.prod(shape) for _, shape in kinds.values()),
            },
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        write_file(tmp / INDEX, dump_config(index))


def _carry(path: Path, parent: dict[str, Any], tmp: Path, others: PassedOn | None) -> list[str]:
    sums = parent.get("files", {})
    if others is not None and not sums:
        beside, _ = others.folder.beside()
        carry(others.folder.path, beside, tmp)
        return beside
    for name, expected in sums.items():
        if not _CARRIED_NAME.fullmatch(name):
            raise CheckpointError(f"{path / MANIFEST}: {name!r} is not the name of a file")
        if file_sum(path / FILES / name) != expected:
            raise CheckpointError(f"{path / FILES / name}: does not match its checksum in {MANIFEST}")
    carry(path / FILES, list(sums), tmp)
    return list(sums)


def _note(native: NativeCheckpoint) -> dict[str, Any]:
    manifest = native.manifest
    return {
        "parent": {
            "format": "native",
            "path": str(native.path.resolve()),
            "hash": xxhash.xxh3_128_hexdigest((native.path / MANIFEST).read_bytes()),
            "run": manifest.run,
            "epoch": manifest.epoch,
            "step": manifest.step,
        }
    }
