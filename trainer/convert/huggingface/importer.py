"""A Hugging Face folder to a native checkpoint of weights. Without torch; memory is bounded by one tensor."""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from keepwarm.files import sync_directory
from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import Piece
from keepwarm.ft.format.manifest import Part
from keepwarm.ft.format.writer import write_part_blocks
from keepwarm.trainer.convert.dtypes import NAMES
from keepwarm.trainer.convert.huggingface.config import with_dtype
from keepwarm.trainer.convert.huggingface.folder import CONFIG, HuggingFaceFolder, dump_config
from keepwarm.trainer.convert.huggingface.passed_on import set_aside
from keepwarm.trainer.convert.native import PREFIX
from keepwarm.trainer.convert.output_folder import new_folder
from keepwarm.trainer.convert.recipes import Recipe, into_canonical, names_of, source_shapes
from keepwarm.trainer.convert.streaming import Maker
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.families.config_fields import shown
from keepwarm.trainer.model.families.tensor_names import is_constant
from keepwarm.trainer.model.huggingface_config import read_hf_config
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.model.transformers.composite import is_composite
from keepwarm.trainer.model.transformers_spec import TransformersSpec

FILES = "huggingface"
"""Folder inside the checkpoint with the tokenizer and whatever else is carried along."""

Progress = Callable[[int, int], object]
"""Called with the bytes written so far and those of the whole model."""


def silent(done: int, total: int) -> None:
    """No progress is shown."""


def from_huggingface(
    source: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    ignored_keys: Collection[str] = (),
    model: TransformersSpec | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the checkpoint folder `destination`; returns what was done, with what was left behind.

    The manifest's `meta` holds the model spec, the parent with the hash of its weights, and the parent's config.
    `dtype` (F32, BF16, F16) converts every tensor; by default each keeps its own. `ignored_keys` are fields of the
    config that change nothing, which keepwarm does not know. With `model`, the folder holds weights of that class of
    transformers, not of a native family.

    Raises:
        SpecError: the config asks for what a model spec cannot say; names the field.
        CheckpointError: a tensor or file is missing, left over, damaged or does not fit; names it.
        OutputError: `destination` exists or cannot be written; nothing is left there.
    """
    with HuggingFaceFolder(source) as folder:
        settled = _settled(folder, ignored_keys, model, compare=True)
        spec, model_type = settled.spec, str(folder.config["model_type"])
        carried, left = folder.beside()
        maker, hashes = Maker(folder, dtype), dict[str, str]()
        recipes = {PREFIX + recipe.name: recipe for recipe in into_canonical(spec, model_type)}
        with new_folder(destination) as tmp:
            part = _write(tmp, maker, recipes, hashes, progress)
            for entry in part.entries:
                hashes.setdefault(entry.piece.name, entry.xxh3)
            beside = {
                "config": folder.config if dtype is None else with_dtype(folder.config, dtype),
                "files": carry(source, carried, tmp / FILES),
                "tied_head": settled.tied_head,
                "ignored_keys": sorted(ignored_keys),
            }
            publication.write_manifest(
                tmp,
                publication.Identity(run=source.resolve().name, epoch=0, step=0, layout="whole"),
                ranks=1,
                meta=_meta(spec, source, _hash(folder.config, hashes)) | {FILES: beside},
            )
    return {
        "source": str(source),
        "destination": str(destination),
        "model_type": model_type,
        "tensors": len(recipes),
        "parameters": sum(recipe.elements for recipe in recipes.values()),
        "bytes": part.data_bytes,
        "dtypes": sorted({entry.piece.dtype for entry in part.entries}),
        "carried": carried,
        "left": left + settled.constants,
        "passed_on": settled.others,
        "unread": settled.unread,
    }


def check_folder(source: Path, ignored_keys: Collection[str] = (), model: TransformersSpec | None = None) -> None:
    """Raise what `from_huggingface` would, as far as the config and the headers of the files say so."""
    with HuggingFaceFolder(source) as folder:
        _settled(folder, ignored_keys, model, compare=False)


class _Settled(NamedTuple):
    """What a folder holds, whose tensors have got their usual names."""

    spec: AnyModelSpec
    unread: list[str]
    others: list[str]
    tied_head: list[str]
    constants: list[str]


def _settled(
    folder: HuggingFaceFolder, ignored_keys: Collection[str], model: TransformersSpec | None, *, compare: bool
) -> _Settled:
    """Check config and tensors, and settle their names; copies of a tied head are read if they are to `compare`."""
    spec, unread = _spec(folder, ignored_keys) if model is None else (_same(folder, model), [])
    model_type = str(folder.config["model_type"])
    others = set_aside(folder) if model is not None and is_composite(model.config) else []
    tied_head = _settle_names(folder, model_type, spec, compare=compare)
    return _Settled(spec, unread, others, tied_head, _check(folder, model_type, spec))


def _meta(spec: AnyModelSpec, source: Path, parent: str) -> dict[str, Any]:
    return {
        "weights_only": True,
        "note": "model weights alone: no optimizer state, no ledger",
        "model": spec.model_dump(mode="json"),
        "parent": {"format": "huggingface", "path": str(source.resolve()), "hash": parent},
    }


def carry(source: Path, names: list[str], target: Path) -> dict[str, str]:
    """Copy files of one folder into another, synced; returns the xxh3 of each."""
    if names:
        target.mkdir(exist_ok=True)
    sums = {}
    for name in names:
        shutil.copyfile(source / name, target / name)
        sums[name] = file_sum(target / name, flush=True)
    if names:
        sync_directory(target)
    return sums


def file_sum(path: Path, *, flush: bool = False) -> str:
    """The xxh3 of a file, which is synced with `flush`. Raises `CheckpointError` when it cannot be read."""
    seen = xxhash.xxh3_64()
    try:
        with path.open("rb") as file:
            while block := file.read(4 << 20):
                seen.update(block)
            if flush:
                os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return seen.hexdigest()


def whole_piece(name: str, recipe: Recipe, maker: Maker) -> Piece:
    """The one piece of a tensor that is made whole."""
    return Piece(
        name=name,
        global_shape=recipe.shape,
        offsets=(0,) * len(recipe.shape),
        shape=recipe.shape,
        dtype=maker.dtype(recipe),
    )


def _write(tmp: Path, maker: Maker, recipes: Mapping[str, Recipe], hashes: dict[str, str], progress: Progress) -> Part:
    total, done = sum(maker.bytes(recipe) for recipe in recipes.values()), 0
    as_stored = {name: xxhash.xxh3_64() for name, recipe in recipes.items() if not maker.keeps(recipe)}

    pieces = [whole_piece(name, recipe, maker) for name, recipe in recipes.items()]

    def seen(recipe: Recipe) -> Callable[[Any], object] | None:
        sums = as_stored.get(PREFIX + recipe.name)
        return None if sums is None else sums.update

    with maker.ahead(recipes.values(), seen) as take:

        def blocks(piece: Piece) -> Any:
            nonlocal done
            for block in take(recipes[piece.name]):
                yield block
                done += len(block)
                progress(done, total)

        try:
            part = write_part_blocks(tmp, 0, pieces, blocks)
        except FtError as error:
            raise CheckpointError(str(error)) from error
    hashes.update({name: sums.hexdigest() for name, sums in as_stored.items()})
    return part


def _spec(folder: HuggingFaceFolder, ignored_keys: Collection[str]) -> tuple[ModelSpec, list[str]]:
    """Return the model spec, and the fields of the config that were passed over."""
    try:
        spec, unread = read_hf_config(folder.config, ignored_keys)
    except SpecError as error:
        raise SpecError(f"{folder.path / CONFIG}: {str(error).removeprefix('config.json: ')}") from error
    if spec.layers > len(folder.tensors):
        raise CheckpointError(f"{folder.path}: {spec.layers} layers, but only {len(folder.tensors)} tensors")
    return spec, unread


_SAYS_NOTHING = {
    "architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "_attn_implementation_autoset",
}  # fmt: skip
"""Fields of a config in which the one of the weights and the one of the job may differ."""


def _same(folder: HuggingFaceFolder, model: TransformersSpec) -> TransformersSpec:
    """Return the model. Raise `CheckpointError` unless the weights are of its config."""
    theirs, ours = folder.config, model.config
    for name in sorted((theirs.keys() | ours.keys()) - _SAYS_NOTHING):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{folder.path / CONFIG}: {name} is {shown(theirs.get(name))}, in the config of the job's model "
                f"{shown(ours.get(name))}"
            )
    return model


def _settle_names(folder: HuggingFaceFolder, model_type: str, spec: AnyModelSpec, *, compare: bool) -> list[str]:
    """Give tensors their usual names; return the copies of a tied head that were set aside."""
    names, tensors = names_of(spec, model_type), folder.tensors
    embedding, head = names.name("embedding.weight"), names.name("head.weight")
    base = embedding.split(".")[0] + "."
    if embedding not in tensors and embedding.removeprefix(base) in tensors:
        # Saved from the class without a head, whose names have no prefix.
        for name in [name for name in tensors if name != head]:
            tensors[base + name] = tensors.pop(name)
    alias = f"{names.head_alias}.weight" if names.head_alias else head
    if head not in tensors and alias in tensors:
        tensors[head] = tensors.pop(alias)
    tied = [name for name in dict.fromkeys((head, alias)) if spec.tied_embeddings and name in tensors]
    for name in tied:
        if compare and embedding in tensors and not folder.same(embedding, name):
            raise CheckpointError(
                f"{tensors[name].file}: {name} differs from {embedding}, but {CONFIG} says tie_word_embeddings"
            )
        del tensors[name]
    return tied


def _check(folder: HuggingFaceFolder, model_type: str, spec: AnyModelSpec) -> list[str]:
    """Check that every tensor of the model is there in its shape, and no other; return the constants set aside."""
    embedding = folder.tensors.get(names_of(spec, model_type).name("embedding.weight"))
    wanted = (spec.vocabulary_size, spec.hidden_size)
    if embedding is not None and embedding.shape != wanted:
        # Checked first: the sizes that follow are those of the file, whatever the config claims.
        raise CheckpointError(
            f"{embedding.file}: the embedding is {list(embedding.shape)}, {CONFIG} says {list(wanted)}"
        )
    shapes = source_shapes(spec, model_type)
    for name, shape in shapes.items():
        if name not in folder.tensors:
            raise CheckpointError(f"{folder.path}: {name} is missing, {CONFIG} asks for it")
        stored = folder.tensors[name]
        if stored.shape != shape:
            raise CheckpointError(f"{stored.file}: {name} is {list(stored.shape)}, {CONFIG} says {list(shape)}")
        if stored.dtype not in NAMES:
            raise CheckpointError(f"{stored.file}: {name} is of dtype {stored.dtype}, only {', '.join(NAMES)} can be")
    surplus = sorted(set(folder.tensors) - set(shapes))
    constants = [name for name in surplus if is_constant(name, folder.tensors[name].dtype)]
    unplaced = [name for name in surplus if name not in constants]
    if unplaced:
        raise CheckpointError(
            f"{folder.tensors[unplaced[0]].file}: {unplaced[0]} has no place in the model ({len(unplaced)} such)"
        )
    return constants


def _hash(config: dict[str, Any], hashes: Mapping[str, str]) -> str:
    """Of the config and of every tensor as it was stored, in the order of their names."""
    seen = xxhash.xxh3_128(dump_config(config))
    for name in sorted(hashes):
        seen.update(f"{name} {hashes[name]}\n".encode())
    return seen.hexdigest()
