"""Write tensors to a `torch.distributed.checkpoint` folder with torch's own writer, one chunk in memory at a time."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from keepwarm.ft.worker.snapshotter import DTYPES
from keepwarm.trainer.convert.dialects import Chunk, Theirs
from keepwarm.trainer.convert.streaming import Maker

TORCH = {name: dtype for dtype, name in DTYPES.items()}


class _Planner(DefaultSavePlanner):
    """Plans chunks that do not exist yet, and builds each when it is written."""

    def __init__(self, tensors: Sequence[Theirs], maker: Maker, written: Callable[[int], object]) -> None:
        super().__init__()
        self._maker = maker
        self._written = written
        self._theirs = tensors
        self._chunks: dict[MetadataIndex, Chunk] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for tensor in self._theirs:
            for at, chunk in enumerate(tensor.chunks):
                index = MetadataIndex(tensor.name, torch.Size(chunk.offsets), at)
                self._chunks[index] = chunk
                data = TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.recipe.shape)),
                    properties=TensorProperties(dtype=TORCH[self._maker.dtype(chunk.recipe)]),
                    size=torch.Size(tensor.shape),
                )
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={tensor.name: (tensor.name,) for tensor in self._theirs})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        recipe = self._chunks[write_item.index].recipe
        tensor = torch.empty(recipe.shape, dtype=TORCH[self._maker.dtype(recipe)])
        memory, at = tensor.reshape(-1).view(torch.uint8).numpy(), 0
        for block in self._maker.blocks(recipe):
            memory[at : at + len(block)] = block
            at += len(block)
        self._written(at)
        return tensor


def write_dcp(folder: Path, tensors: Sequence[Theirs], maker: Maker, progress: Callable[[int, int], object]) -> int:
    """Write and sync the files and `.metadata` of a DCP checkpoint; return the total bytes of all tensors."""
    total = sum(maker.bytes(chunk.recipe) for tensor in tensors for chunk in tensor.chunks)
    done = 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    planner: Any = _Planner(tensors, maker, written)
    with warnings.catch_warnings():
        # DCP warns about running in a single process, which is intended here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save({}, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
        except CheckpointException as error:
            # Raise the error of the only rank, as if DCP were not involved.
            failure, _ = next(iter(error.failures.values()))
            raise failure from error
    return total
