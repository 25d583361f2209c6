"""Read a `torch.distributed.checkpoint` (DCP) folder written by torchtitan, Megatron Core or keepwarm.

Its `.metadata` is a pickle, and so is each tensor. The metadata are read by an unpickler that only accepts the few
classes that DCP's metadata consist of; the tensors by `torch.load(weights_only=True)`. Non-tensor objects are never
opened.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import FtError
from keepwarm.ft.format.contents import ITEM_SIZE, Piece, move_bytes, plan
from keepwarm.ft.worker.snapshotter import DTYPES
from keepwarm.trainer.errors import CheckpointError

METADATA = ".metadata"

_CLASSES = {
    **{
        (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    **{("torch.distributed.checkpoint.filesystem", cls.__name__): cls for cls in (_StorageInfo, _StoragePrefix)},
    **{
        (dcp_planner.__name__, name): getattr(dcp_planner, name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES},
    ("pathlib", "PosixPath"): Path,
    ("pathlib", "Path"): Path,
    ("collections", "OrderedDict"): dict,
    ("collections", "ChainMap"): dict,
    ("builtins", "set"): set,
}
"""All classes in the metadata of DCP's own writers; none of them does anything but hold values."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no DCP metadata need") from None


class DcpFolder:
    """An open folder: tensors by name, each read chunk by chunk."""

    def __init__(self, path: Path, *, trust_pickle: bool = False) -> None:
        """Read the metadata.

        Args:
            trust_pickle: let an unusual `.metadata` run whatever code it holds.

        Raises:
            CheckpointError: not such a folder, or its metadata would run code; names the file.
        """
        self.path = path
        metadata = _read_metadata(path / METADATA, trust_pickle)
        self.tensors: dict[str, Any] = {}
        self.objects: list[str] = []
        """Names of pickled objects, which are not read."""
        for name, kept in metadata.state_dict_metadata.items():
            if isinstance(kept, dcp_metadata.TensorStorageMetadata):
                self.tensors[name] = kept
            else:
                self.objects.append(name)
        self._stored = {
            (index.fqn, tuple(index.offset or ())): info for index, info in (metadata.storage_data or {}).items()
        }
        self._stacked: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).size)

    def dtype(self, name: str) -> str:
        found = DTYPES.get(self._tensor(name).properties.dtype)
        if found is None:
            raise CheckpointError(f"{self.path}: {name} is of dtype {self._tensor(name).properties.dtype}")
        return found

    def stack(self, name: str) -> None:
        """Treat each index of this tensor's first dimension as a unit from now on."""
        self._stacked.add(name)

    def unit_bytes(self, name: str) -> int:
        shape = self.shape(name)
        return math.prod(shape[1:] if name in self._stacked else shape) * ITEM_SIZE[self.dtype(name)]

    def unit(self, name: str, index: int) -> Bytes:
        """Read as `keepwarm.trainer.convert.whole.Units` does."""
        shape, dtype = self.shape(name), self.dtype(name)
        offsets, part = (0,) * len(shape), shape
        if name in self._stacked:
            offsets, part = (index, *offsets[1:]), (1, *shape[1:])
        target = _piece(name, shape, offsets, part, dtype)
        sources = [
            _piece(name, shape, tuple(chunk.offsets), tuple(chunk.sizes), dtype) for chunk in self._tensor(name).chunks
        ]
        out = np.empty(target.bytes, np.uint8)
        try:
            moves = plan(target, sources)
        except FtError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        for source in sorted({move.source for move in moves}):
            held = self._chunk(sources[source])
            for move in moves:
                if move.source == source:
                    start, stop = move.span
                    move_bytes(move, held[start:stop], out)
        return out

    def number(self, name: str) -> float:
        """Return the value of a single-element tensor."""
        return float(self._load(_piece(name, self.shape(name), (0,) * len(self.shape(name)), self.shape(name), "U8")))

    def _tensor(self, name: str) -> Any:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return self.tensors[name]

    def _chunk(self, piece: Piece) -> Bytes:
        tensor = self._load(piece)
        if DTYPES.get(tensor.dtype) != piece.dtype or tensor.numel() != piece.elements:
            raise CheckpointError(
                f"{self.path}: {piece.name} at {list(piece.offsets)} is {tensor.dtype}{list(tensor.shape)}, "
                f"its metadata say {piece.dtype}{list(piece.shape)}"
            )
        held: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return held

    def _load(self, piece: Piece) -> torch.Tensor:
        info = self._stored.get((piece.name, piece.offsets)) or self._stored.get((piece.name, ()))
        if info is None:
            raise CheckpointError(f"{self.path / METADATA}: does not say where {piece.name} lies")
        file = self.path / info.relative_path
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{self.path / METADATA}: {info.relative_path!r} is not the name of a file in it")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{file}: compressed by an extension of DCP, which is not read here")
        try:
            with file.open("rb") as opened:
                if not 0 <= info.offset <= info.offset + info.length <= file.stat().st_size:
                    raise CheckpointError(f"{file}: too short for {piece.name}; is it truncated?")
                opened.seek(info.offset)
                content = io.BytesIO(opened.read(info.length))
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}") from error
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{file}: {piece.name} cannot be read as a tensor: {first}") from error
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{file}: {piece.name} is a {type(tensor).__name__}, not a tensor")
        return tensor.detach()


def _piece(
    name: str, whole: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...], dtype: str
) -> Piece:  # fmt: skip
    try:
        return Piece(name=name, global_shape=whole, offsets=offsets, shape=shape, dtype=dtype)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _read_metadata(file: Path, trust_pickle: bool) -> Any:
    try:
        with file.open("rb") as opened:
            found = pickle.load(opened) if trust_pickle else _Unpickler(opened).load()  # noqa: S301
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; a DCP checkpoint has one, and it is written last") from error
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except Exception as error:
        hint = "" if trust_pickle else "; --trust-pickle would run what it holds: only for files you made yourself"
        raise CheckpointError(f"{file}: {error or type(error).__name__}{hint}") from error
    if not isinstance(found, dcp_metadata.Metadata):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, not DCP's metadata")
    return found
