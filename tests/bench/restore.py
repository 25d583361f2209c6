"""Restoring a worker's state from its agent's memory, against loading it from a DCP checkpoint with a cold page cache.

    python -m tests.bench.restore [GB ...]      # 0.25 1 without arguments

One node of one rank. Ours is what a restarted worker does: connect, attach (which maps the memory), agree on the
snapshot, before which the agent checks every checksum, and write the live tensors; `memory_seconds_checked` is when the
second check of all checksums, which runs beside the first step, has ended as well. DCP loads the same tensors from
local disk after their pages were dropped from the cache (`posix_fadvise(DONTNEED)`; `cached_share` is what was left of
them), and once more from the cache. Both end with the same bits, which is checked. Medians of `ROUNDS` rounds; prints
one JSON object.
"""

import ctypes
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from keepwarm.ft.worker.snapshotter import Snapshotter, plan_part
from tests.support.ft.nodes import Nodes, Tensor, wait_committed

ROUNDS = 5
BUCKET = 8 << 20
TENSOR = 64 << 20


def main(gigabytes: list[float]) -> dict[str, Any]:
    result: dict[str, Any] = {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0], "wanted": "at least 5"}
    for size in gigabytes:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            result[f"{size:g}_gb"] = measure(Path(folder), int(size * 1e9))
    return result


def measure(folder: Path, size: int) -> dict[str, Any]:
    count = max(1, round(size / TENSOR))
    length = size // count // 4
    state = {f"t{i}": Tensor(f"t{i}", (length,), (0,), (length,), torch.randn(length), (0,)) for i in range(count)}
    tensors = {name: tensor.local for name, tensor in state.items()}
    expected = [tensor.sum(dtype=torch.float64).item() for tensor in tensors.values()]
    first = [tensor[:4096].clone() for tensor in tensors.values()]

    def forget() -> None:
        for tensor in tensors.values():
            tensor.zero_()

    def check() -> None:
        assert all(torch.equal(tensor[:4096], part) for tensor, part in zip(tensors.values(), first, strict=True))
        assert [tensor.sum(dtype=torch.float64).item() for tensor in tensors.values()] == expected

    memory: list[float] = []
    checked: list[float] = []
    attached: list[float] = []
    cold: list[float] = []
    warm: list[float] = []
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as short:  # a socket's path must be short
        world = Nodes(Path(short), 1, state_bytes=plan_part(state, 0, BUCKET).size, bucket_bytes=BUCKET, lease=600.0)
        try:
            world.start_all()
            Worker(world, state).leave_a_snapshot()
            checkpoint = folder / "dcp"
            dcp.save(tensors, checkpoint_id=checkpoint, no_dist=True)
            for epoch in range(2, 2 + ROUNDS):
                forget()
                began = time.perf_counter()
                worker = Worker(world, state)
                attached.append(time.perf_counter() - began)
                worker.restore(epoch)
                memory.append(time.perf_counter() - began)
                worker.snapshotter.join()
                checked.append(time.perf_counter() - began)
                check()
                worker.close()
                shares.append(drop_cache(checkpoint))
                for seconds in (cold, warm):
                    forget()
                    began = time.perf_counter()
                    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
                    seconds.append(time.perf_counter() - began)
                    check()
        finally:
            world.close()
    ours = statistics.median(memory)
    return {
        "bytes": length * 4 * count,
        "memory_seconds": round(ours, 4),
        "memory_seconds_of_them_attaching": round(statistics.median(attached), 4),
        "memory_seconds_checked": round(statistics.median(checked), 4),
        "memory_gb_per_s": round(length * 4 * count / ours / 1e9, 3),
        "dcp_cold_seconds": round(statistics.median(cold), 4),
        "dcp_cached_seconds": round(statistics.median(warm), 4),
        "cached_share": round(max(shares), 4),
        "dcp_cold_over_ours": round(statistics.median(cold) / ours, 2),
        "dcp_cached_over_ours": round(statistics.median(warm) / ours, 2),
    }


class Worker:
    """A worker at the agent, as after its start."""

    def __init__(self, world: Nodes, state: dict[str, Tensor]) -> None:
        self.client = world.connect(0)
        self.snapshotter = Snapshotter(self.client, state, world.place(0), layout="bench")

    def restore(self, epoch: int) -> None:
        restored = self.snapshotter.restore(epoch)
        assert not isinstance(restored, str), restored

    def leave_a_snapshot(self) -> None:
        self.snapshotter.restore(1)
        self.snapshotter.offer(1, b"meta")
        self.snapshotter.join()
        if self.snapshotter.failure is not None or self.snapshotter.sealed is None:
            raise RuntimeError(f"the snapshot was not taken: {self.snapshotter.failure}")
        wait_committed(self.snapshotter)
        self.close()

    def close(self) -> None:
        self.client.close()


def drop_cache(folder: Path) -> float:
    """Write the files out and drop their pages; returns the share of pages that stayed in the cache."""
    pages = resident = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(descriptor).st_size
            with mmap.mmap(descriptor, size) as mapped:
                found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
                start = ctypes.c_char.from_buffer(mapped)
                if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found):
                    raise OSError(ctypes.get_errno(), "mincore")
                del start
            pages += len(found)
            resident += sum(page & 1 for page in found)
        finally:
            os.close(descriptor)
    return resident / pages


if __name__ == "__main__":
    print(json.dumps(main([float(argument) for argument in sys.argv[1:]] or [0.25, 1.0]), indent=2))
