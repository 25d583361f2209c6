"""Tensors of a folder of several models that are no part of its text decoder: an export has them byte for byte."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import FtError
from keepwarm.ft.format.manifest import MANIFEST, Manifest, read_manifest
from keepwarm.trainer.convert.huggingface.folder import CONFIG, HuggingFaceFolder
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.convert.safetensors_file import Stored
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.model.transformers.composite import LAYOUTS, Layout, is_composite, layout_of

_BLOCK = 8 << 20
_GENERATIONS = 100
"""Most parents that are asked for the folder, one after the other."""


class PassedOn:
    """The folder that the weights of a text decoder came from, and the tensors in it of other models."""

    def __init__(self, folder: HuggingFaceFolder, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self.tensors: dict[str, Stored] = {
            name: stored for name, stored in folder.tensors.items() if layout.plain(name) is None
        }

    def blocks(self, name: str) -> Iterator[Bytes]:
        """Yield the bytes of a tensor."""
        size = self.tensors[name].size
        for start in range(0, size, _BLOCK):
            block = np.empty(min(_BLOCK, size - start), np.uint8)
            self.folder.read(name, start, block)
            yield block


def set_aside(folder: HuggingFaceFolder) -> list[str]:
    """Leave a folder the tensors of its text decoder, under plain names; return the names of the others.

    Raises:
        CheckpointError: there is no text decoder.
    """
    layout = layout_of(folder.tensors)
    if layout is None:
        names = " and ".join(layout.placed("model.embed_tokens.weight") for layout in LAYOUTS)
        raise CheckpointError(f"{folder.path}: its config has several models, but it has no tensor {names}")
    others = [name for name in folder.tensors if layout.plain(name) is None]
    folder.tensors = {plain: stored for name, stored in folder.tensors.items() if (plain := layout.plain(name))}
    return others


@contextlib.contextmanager
def passed_on(native: NativeCheckpoint, spec: AnyModelSpec) -> Iterator[PassedOn | None]:
    """Open what an export passes on; None if the weights are those of one model, or began from scratch.

    Raises:
        CheckpointError: the folder that the weights came from is gone, or another one now.
    """
    path = None if isinstance(spec, ModelSpec) or not is_composite(spec.config) else _origin(native)
    if path is None:
        yield None
        return
    assert not isinstance(spec, ModelSpec)
    with HuggingFaceFolder(path) as folder:
        layout = layout_of(folder.tensors)
        if layout is None or folder.config.get("model_type") != spec.model_type:
            raise CheckpointError(f"{path}: is no longer the folder that the weights of {native.path} came from")
        yield PassedOn(folder, layout)


def _origin(native: NativeCheckpoint) -> Path | None:
    """Return the Hugging Face folder from which a checkpoint descends, or None."""
    manifest = native.manifest
    for _ in range(_GENERATIONS):
        path = _parent(manifest)
        if path is None or (path / CONFIG).is_file():
            return path
        try:
            manifest = read_manifest(path)
        except (OSError, FtError) as error:
            raise CheckpointError(
                f"{native.path}: the models beside its text decoder are in the folder that it came from, by way of "
                f"{path}, which has neither {CONFIG} nor {MANIFEST}; put it back there"
            ) from error
    return None


def _parent(manifest: Manifest) -> Path | None:
    record = manifest.meta.get("parent") or manifest.meta.get("run", {}).get("parent")
    path = record.get("path") if isinstance(record, dict) else None
    return Path(path) if isinstance(path, str) else None
