"""Real agents take no more memory than planned, while they mend others too."""

import threading
import time
from pathlib import Path

import psutil
import torch

from keepwarm.ft.discovery.config import DurableConfig
from keepwarm.ft.format import publication
from keepwarm.ft.memory.buffers import host_memory
from tests.support.ft.nodes import Nodes, Tensor, nodes, together, wait_committed

MIB = 1 << 20
STATE = 96 * MIB
BUCKET = 4 * MIB
SLACK = 64 * MIB


class Watch:
    """The largest memory of each agent, all its mappings and buffers included, while a block runs."""

    def __init__(self, world: Nodes) -> None:
        self.peak = dict.fromkeys(world.pids, 0)
        self._world, self._over = world, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.002):
            for slot, pid in self._world.pids.items():
                try:
                    self.peak[slot] = max(self.peak[slot], psutil.Process(pid).memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def state(rank: int, seed: int = 0) -> dict[str, Tensor]:
    size = (STATE - 2 * MIB) // 4
    values = torch.randn(1, size, generator=torch.Generator().manual_seed(rank + seed))
    return {"w": Tensor("w", (3, size), (rank, 0), (1, size), values, (rank,))}


def test_agents_stay_within_the_plan_while_they_commit_save_and_decode(tmp_path: Path) -> None:
    planned = host_memory(STATE, members=3, parity=1, bucket_bytes=BUCKET, durable=True).total
    config = DurableConfig(root=str(tmp_path / "checkpoints"), every=2)
    with nodes(
        tmp_path, 3, groups=[((0, 1, 2), 1)], state_bytes=STATE, bucket_bytes=BUCKET, durable=config
    ) as world, Watch(world) as watch:  # fmt: skip
        states = [state(rank) for rank in range(3)]
        snapshotters = world.snapshotters(states)
        together(lambda each: each.restore(1), snapshotters)
        for step in (1, 2):
            for each in snapshotters:
                each.offer(step, b"meta")
            for each in snapshotters:
                each.join()
            for each in snapshotters:
                wait_committed(each)
        for client in world.clients:
            client.close()
        saved = time.monotonic() + 60
        while publication.latest(tmp_path / "checkpoints") is None:
            assert time.monotonic() < saved, "nothing was saved"
        world.kill(2)
        world.start(2)
        fresh = [state(rank, seed=10) for rank in range(3)]
        restored = together(lambda each: each.restore(2), world.snapshotters(fresh))
        assert [each.step for each in restored] == [2, 2, 2]
        assert all(torch.equal(fresh[rank]["w"].local, states[rank]["w"].local) for rank in range(3))
        whole = time.monotonic() + 60
        while any(len(held.chunks) < 3 for slot in range(3) for held in world.status(slot).held if held.step == 2):
            assert time.monotonic() < whole, "parity was not rebuilt"
    print(
        {slot: f"{(peak - planned) / MIB:+.0f} MiB" for slot, peak in watch.peak.items()}, f"plan {planned / MIB:.0f}"
    )
    assert {slot: peak for slot, peak in watch.peak.items() if peak > planned + SLACK} == {}
