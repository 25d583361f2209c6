"""Write the part of a checkpoint that belongs to this rank, and read it back."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import DurableError
from keepwarm.ft.format.contents import ITEM_SIZE, Piece
from keepwarm.ft.format.manifest import Part
from keepwarm.ft.format.reader import BLOCK, compare, read_header, read_part
from keepwarm.ft.format.writer import write_part_blocks
from keepwarm.ft.worker.snapshotter import piece_of
from keepwarm.parallel.shard import Shard


def write(
    folder: Path, rank: int, shards: Sequence[Shard], meta: Mapping[str, str], advance: Callable[[], object]
) -> Part:
    """Write the shards into this rank's file and verify every byte of it. `advance` is called for each block.

    Only one tensor at a time is copied to host memory.

    Raises:
        OSError, FtError: it cannot be written, or what is read differs from what was written.
    """
    held = {shard.name: shard for shard in shards}
    pieces = sorted(map(piece_of, shards), key=lambda piece: (-ITEM_SIZE[piece.dtype], piece.name))

    def blocks(piece: Piece) -> Iterator[memoryview]:
        whole = host_bytes(held[piece.name].local)
        for at in range(0, len(whole), BLOCK):
            advance()
            yield whole.data[at : at + BLOCK]

    part = write_part_blocks(folder, rank, pieces, blocks, meta=meta)
    _verify(folder, part, advance)
    return part


def _verify(folder: Path, part: Part, advance: Callable[[], object]) -> None:
    """Raise DurableError unless the file, read from the disk, holds what the part says."""
    path = folder / part.file
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # The file is synced: dropping it from the page cache makes what follows read the disk.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    if read_header(path) != part:
        raise DurableError(f"{path}: its header is not the one that was written")
    memory = np.empty(BLOCK, np.uint8)
    for entry, found in read_part(folder, part, memory):
        seen = xxhash.xxh3_64()
        for block in found:
            advance()
            seen.update(block)
        compare(folder, part, entry, seen.hexdigest())


def host_bytes(tensor: torch.Tensor) -> Bytes:
    """Return the bytes of a tensor in row-major order; a view if it is contiguous in host memory."""
    array: Bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array
