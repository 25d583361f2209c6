"""Read a `torch.distributed.checkpoint` (DCP) folder written by torchtitan, Megatron Core or keepwarm.

Its `.metadata` is a pickle, and so is each tensor. The former is read by `keepwarm.trainer.convert.dcp.metadata`, the
tensors by `torch.load(weights_only=True)`. Non-tensor objects are never opened.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import FtError
from keepwarm.ft.format.contents import ITEM_SIZE, Piece, move_bytes, plan
from keepwarm.ft.worker.snapshotter import DTYPES
from keepwarm.trainer.convert.dcp.metadata import METADATA, StoredTensor, read_metadata
from keepwarm.trainer.errors import CheckpointError


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
        metadata = read_metadata(path / METADATA, trust_pickle)
        self.tensors = metadata.tensors
        self.objects = list(metadata.objects)
        """Names of pickled objects, which are not read."""
        self._places = metadata.places
        self._stacked: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        return self._tensor(name).dtype

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
        sources = [_piece(name, shape, offsets, sizes, dtype) for offsets, sizes in self._tensor(name).chunks]
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

    def _tensor(self, name: str) -> StoredTensor:
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
        place = self._places.get((piece.name, piece.offsets)) or self._places.get((piece.name, ()))
        if place is None:
            raise CheckpointError(f"{self.path / METADATA}: does not say where {piece.name} lies")
        file = self.path / place.file
        if Path(place.file).name != place.file:
            raise CheckpointError(f"{self.path / METADATA}: {place.file!r} is not the name of a file in it")
        if place.transformed:
            raise CheckpointError(f"{file}: compressed by an extension of DCP, which is not read here")
        try:
            with file.open("rb") as opened:
                if place.start + place.length > file.stat().st_size:
                    raise CheckpointError(f"{file}: too short for {piece.name}; is it truncated?")
                opened.seek(place.start)
                content = io.BytesIO(opened.read(place.length))
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}") from error
        except CheckpointError:
            raise
        except Exception as error:
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
