"""Copy of live tensors into a buffer, as a ratio to memcpy of the same bytes in the same run; faults after warm-up.

`python tests/bench/copy.py [MiB]` prints one JSON object; medians of `ROUNDS` rounds.
"""

import ctypes
import json
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from keepwarm.ft.keeper import memory_file
from keepwarm.ft.memory.shared_memory import SharedBuffer
from keepwarm.ft.worker.snapshotter import Snapshotter, plan_part
from tests.support.ft.nodes import Tensor

ROUNDS = 9
BUCKET = 4 << 20


class _NeverRevoked:
    def revoked(self, _: object) -> bool:
        return False


def main(mebibytes: int) -> dict[str, float | int]:
    count = 8
    size = (mebibytes << 20) // count // 4
    state = {f"t{i}": Tensor(f"t{i}", (size,), (0,), (size,), torch.randn(size), (0,)) for i in range(count)}
    plan = plan_part(state, 0, BUCKET)
    buffer = SharedBuffer.of(memory_file("bench"), plan.size)
    snapshotter = Snapshotter.__new__(Snapshotter)  # the copy alone, without an agent
    snapshotter.state, snapshotter.plan, snapshotter._first, snapshotter._device_copy = state, plan, 0, None
    snapshotter.client = _NeverRevoked()  # type: ignore[assignment]
    snapshotter._cancelled = threading.Event()
    source = np.ones(count * size * 4, np.uint8)

    def memcpy() -> None:
        ctypes.memmove(buffer.data.ctypes.data, source.ctypes.data, len(source))

    def copy() -> None:
        for piece, at in plan.entries:
            np.copyto(buffer.data[at : at + piece.bytes], state[piece.name].local.view(torch.uint8).numpy())

    def with_sums() -> None:
        snapshotter._copy(None, buffer, b"head")  # type: ignore[arg-type]

    works: dict[str, Callable[[], None]] = {"memcpy": memcpy, "copy": copy, "copy_with_checksum": with_sums}
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    faults = 0
    for _ in range(ROUNDS):
        for name, work in works.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
            faults = max(faults, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "mebibytes": mebibytes,
        "memcpy_gb_per_s": round(len(source) / median["memcpy"] / 1e9, 2),
        "copy_to_memcpy": round(median["memcpy"] / median["copy"], 3),
        "copy_with_checksum_to_memcpy": round(median["memcpy"] / median["copy_with_checksum"], 3),
        "page_faults_in_a_round": faults,
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)))
