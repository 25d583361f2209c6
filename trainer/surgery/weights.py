"""Read and write weights of native checkpoints tensor by tensor; shared by all operations on models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import ITEM_SIZE, Piece
from keepwarm.ft.format.manifest import MANIFEST
from keepwarm.ft.format.writer import write_part_blocks
from keepwarm.trainer.convert.dtypes import as_float32, cast
from keepwarm.trainer.convert.huggingface.exporter import check_tensors, model_spec_of
from keepwarm.trainer.convert.huggingface.importer import FILES, carry
from keepwarm.trainer.convert.native import PREFIX, NativeCheckpoint
from keepwarm.trainer.convert.output_folder import new_folder
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.shapes import parameter_shapes
from keepwarm.trainer.model.spec import ModelSpec

Array = npt.NDArray[np.float32]
Make = Callable[[str], Array]
"""Returns the values of one parameter of the new model, given its canonical name."""

_BLOCK = 4 << 20


class Model:
    """The weights of an open checkpoint as float32 arrays."""

    def __init__(self, native: NativeCheckpoint) -> None:
        """Raises `CheckpointError` if the checkpoint does not contain the weights of the model that it describes."""
        self.native = native
        self.spec = model_spec_of(native)
        check_tensors(native, self.spec)

    def dtype(self, name: str) -> str:
        return self.native.dtype(PREFIX + name)

    def read(self, name: str) -> Array:
        """Return a whole parameter; the caller owns the array."""
        tensor = self.native.tensors[PREFIX + name]
        held = np.empty(tensor.bytes, np.uint8)
        self.native.read(PREFIX + name, 0, held)
        return as_float32(held, tensor.dtype).reshape(tensor.shape)

    @property
    def origin(self) -> dict[str, Any]:
        """Return the origin record of this checkpoint, for the manifests of derived models."""
        manifest = self.native.manifest
        return {"format": "native", "path": str(self.native.path.resolve()), "run": manifest.run, "step": manifest.step}


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """How a model was made, for its lineage."""

    parents: Sequence[Model]
    made_by: str
    """The operation, in the past tense."""
    settings: dict[str, Any]
    keep_files: bool = True
    """Carry the first parent's tokenizer and other files along."""

    def meta(self, spec: ModelSpec) -> dict[str, Any]:
        """Return what the manifest of the new model records."""
        return {
            "weights_only": True,
            "note": "model weights alone: no optimizer state, no ledger",
            "model": spec.model_dump(mode="json"),
            "made_by": self.made_by,
            "settings": self.settings,
            "parents": [parent.origin for parent in self.parents],
            "parent": self.parents[0].origin,
        }


def write(
    destination: Path, spec: ModelSpec, make: Make, derivation: Derivation, *, dtype: Callable[[str], str]
) -> dict[str, Any]:
    """Write a native checkpoint with weights only; return a summary.

    `dtype` names the type of each parameter, as the safetensors format does.

    Raises:
        CheckpointError: a parent is damaged, or a value does not fit into its dtype; names the tensor.
        OutputError: `destination` exists or cannot be written; nothing is left there.
    """
    pieces = [
        Piece(
            name=PREFIX + name, global_shape=shape, offsets=(0,) * len(shape), shape=shape, dtype=dtype(name)
        )
        for name, shape in parameter_shapes(spec).items()
    ]  # fmt: skip
    pieces.sort(key=lambda piece: -ITEM_SIZE[piece.dtype])

    def blocks(piece: Piece) -> Iterator[Any]:
        values = make(piece.name.removeprefix(PREFIX))
        if values.shape != piece.shape:
            raise AssertionError(f"{piece.name}: made {values.shape} instead of {piece.shape}")
        flat = np.ascontiguousarray(values).reshape(-1)
        for start in range(0, len(flat), _BLOCK):
            yield cast(flat[start : start + _BLOCK].view(np.uint8), "F32", piece.dtype, piece.name)

    first, meta = derivation.parents[0].native, derivation.meta(spec)
    with new_folder(destination) as tmp:
        try:
            part = write_part_blocks(tmp, 0, pieces, blocks)
        except FtError as error:
            raise CheckpointError(str(error)) from error
        if derivation.keep_files and (kept := first.manifest.meta.get(FILES)):
            meta[FILES] = kept | {"files": _carry(first, kept, tmp)}
        publication.write_manifest(
            tmp, publication.Identity(run=first.manifest.run, epoch=0, step=0, layout="whole"), ranks=1, meta=meta
        )
    return {
        "destination": str(destination),
        "made_by": derivation.made_by,
        "parameters": sum(piece.elements for piece in pieces),
        "bytes": part.data_bytes,
        "model": spec.model_dump(mode="json"),
    }


def require_same(models: Sequence[Model]) -> None:
    """Raise `SpecError` unless all have the same parameters in the same shapes."""
    first = parameter_shapes(models[0].spec)
    for other in models[1:]:
        shapes = parameter_shapes(other.spec)
        for name in sorted(first.keys() | shapes.keys()):
            if first.get(name) != shapes.get(name):
                raise SpecError(
                    f"{other.native.path}: {name} is {shapes.get(name, 'missing')} there, "
                    f"{first.get(name, 'missing')} in {models[0].native.path}"
                )


def _carry(native: NativeCheckpoint, kept: dict[str, Any], tmp: Path) -> dict[str, str]:
    sums: dict[str, str] = kept.get("files", {})
    for name in sums:
        if Path(name).name != name:
            raise CheckpointError(f"{native.path / MANIFEST}: {name!r} is not the name of a file")
    copied = carry(native.path / FILES, list(sums), tmp / FILES)
    for name, found in copied.items():
        if found != sums[name]:
            raise CheckpointError(f"{native.path / FILES / name}: does not match its checksum in {MANIFEST}")
    return copied
