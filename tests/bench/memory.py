"""Memory of a snapshot agent against 2 S (1 + m/k), + S with the durable tier, + receive buffers.

`python tests/bench/memory.py [MiB]` prints one JSON object: for each code, with and without the durable tier, the bytes
of buffers (shared memory that the agent has faulted in), the formula, their ratio, and the peak of what else the agent
took above what it had before the first snapshot, beside the receive buffers that the plan allows. S is what the worker
of a node stores, read at the end of several snapshots while all of it is committed and written.
"""

import json
import sys
import tempfile
import threading
from pathlib import Path

import torch

from keepwarm.ft.discovery.config import DurableConfig
from keepwarm.ft.memory.buffers import host_memory
from keepwarm.ft.worker.snapshotter import plan_part
from tests.support.ft.nodes import Tensor, nodes, together, wait_committed

BUCKET = 4 << 20
CODES = ((2, 1), (3, 1), (4, 2))
"""(members of the group, parity chunks of a stripe)."""
SNAPSHOTS = 4


def state(rank: int, world: int, mebibytes: int) -> dict[str, Tensor]:
    count = (mebibytes << 20) // 4 // 8
    return {
        name: Tensor(name, (world * count,), (rank * count,), (count,), torch.randn(count), (rank,))
        for name in map("t{}".format, range(8))
    }


def resident(pid: int) -> tuple[int, int]:
    """Bytes of shared and of other memory that a process has in RAM."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kibibytes = {key: int(fields[key].split()[0]) for key in ("RssShmem", "RssAnon")}
    return kibibytes["RssShmem"] << 10, kibibytes["RssAnon"] << 10


class Peak:
    """The highest private memory of an agent while a context lasts."""

    def __init__(self, pid: int) -> None:
        self._pid, self._end = pid, threading.Event()
        self.before = self.highest = resident(pid)[1]
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.highest = max(self.highest, resident(self._pid)[1])

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def measure(
    folder: Path, members: int, parity: int, durable: bool, mebibytes: int
) -> dict[str, float | int | str | bool]:
    states = [state(rank, members, mebibytes) for rank in range(members)]
    stored = plan_part(states[0], 0, BUCKET, meta_bytes=1024).size
    options = {
        "groups": [(range(members), parity)], "state_bytes": stored, "bucket_bytes": BUCKET,
        "durable": DurableConfig(root=str(folder / "checkpoints"), every=1) if durable else None,
    }  # fmt: skip
    with nodes(folder, members, **options) as world:
        snapshotters = world.snapshotters(states)
        together(lambda one: one.restore(1), snapshotters)
        with Peak(world.pids[0]) as peak:
            for step in range(1, SNAPSHOTS + 1):
                for one in snapshotters:
                    one.offer(step, b"small state")
                for one in snapshotters:
                    one.join()
                    wait_committed(one)
        shared, _ = resident(world.pids[0])
    plan = host_memory(stored, members=members, parity=parity, bucket_bytes=BUCKET, durable=durable)
    buffers = plan.data + plan.parity + plan.durable
    return {
        "code": f"({members - parity}, {parity})", "durable": durable, "state": stored, "buffers": shared,
        "formula": buffers, "buffers_to_formula": round(shared / buffers, 4),
        "private_before": peak.before, "private_more_at_peak": peak.highest - peak.before,
        "receive_buffers_planned": plan.receiving + plan.decoding,
    }  # fmt: skip


def main(mebibytes: int) -> dict[str, object]:
    found = []
    for members, parity in CODES:
        for durable in (False, True):
            with tempfile.TemporaryDirectory(prefix="kw-") as folder:
                found.append(measure(Path(folder), members, parity, durable, mebibytes))
    return {"mebibytes": mebibytes, "bucket": BUCKET, "agents": found}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]) if len(sys.argv) > 1 else 64), indent=1))
