"""Memory that comes and goes under a GPU's page locks: no order of events lets anything be sealed but the state."""

import gc
import random
from collections import Counter

import numpy as np
import torch
import xxhash

from keepwarm.ft.protocol.messages import SnapshotId
from keepwarm.ft.worker.snapshotter import SnapshotOptions, Snapshotter, plan_part
from tests.gpu_stand_in.device import Gpu, inside
from tests.gpu_stand_in.node import BUCKET, PLACE, Client, Node
from tests.gpu_stand_in.runtime import REGISTER, UNREGISTER
from tests.support.ft.nodes import Tensor

ORDERS, MOVES, META = 1000, 8, 64
OPTIONS = SnapshotOptions(meta_bytes=META, deadline=30.0)
MOVE = {
    "snapshot": 10, "keeper lost": 3, "agent died": 2, "restart": 2,
    "lock refused": 1, "lock stays": 1, "copy fails": 1,
}  # fmt: skip


def shard(name: str, local: torch.Tensor) -> Tensor:
    return Tensor(name, tuple(local.shape), (0,) * local.dim(), tuple(local.shape), local, (0,))


class Rank:
    """One rank on a GPU, whose agent has `node`'s memory."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        locals_ = {"w": torch.ones(1500), "step": torch.tensor(0), "b": torch.ones(900).bfloat16()}
        self.state = {name: shard(name, gpu.tensor(local)) for name, local in locals_.items()}
        self.plan = plan_part(self.state, 0, BUCKET, meta_bytes=META)
        self.node = Node(self.plan.buckets)
        self.expected: dict[SnapshotId, dict[str, bytes]] = {}
        self.step = 0
        self.attach()

    def attach(self) -> None:
        self.snapshotter = Snapshotter(self.node.client(), self.state, PLACE, layout="layout", options=OPTIONS)

    def again(self) -> None:
        """Attach to the next agent, in the same process."""
        self.snapshotter.client.close()
        self.attach()

    def train(self) -> None:
        self.step += 1
        for one in self.state.values():
            inside(one.local).add_(1)
        self.gpu.launch()  # raises what a failed call left behind
        self.expected[SnapshotId("run", 1, self.step, "layout")] = {
            name: inside(one.local).view(-1).view(torch.uint8).numpy().tobytes() for name, one in self.state.items()
        }

    def snapshot(self) -> None:
        self.train()
        self.snapshotter.offer(self.step, b"meta")
        self.snapshotter.join()

    def fail_once(self) -> None:
        left = iter([True])

        def fail() -> None:
            if next(left, False):
                raise RuntimeError("CUDA error: out of memory")

        self.gpu.before_copy = fail
        # Training does not stop, and only this snapshot is missing.
        self.snapshotter.offer(self.step, b"meta")
        self.snapshotter.join()
        self.gpu.before_copy = lambda: None
        assert "out of memory" in str(self.snapshotter.failure)

    def move(self, name: str) -> None:
        match name:
            case "snapshot":
                self.snapshot()
                assert self.snapshotter.failure is None
            case "keeper lost":
                self.node.lose()
                self.again()
            case "agent died" | "restart":
                self.again()
            case "lock refused":
                self.gpu.runtime.fail(REGISTER, 2)
            case "lock stays":
                self.gpu.runtime.fail(UNREGISTER, 719)
            case "copy fails":
                self.fail_once()

    def wrong(self) -> list[SnapshotId]:
        """Return what was sealed and is not the state that was offered."""
        return [one.snapshot for one in self.node.sealed if one.pieces != self.expected[one.snapshot]]


class OldRank(Rank):
    """Locks every buffer when it attaches, looks at no code and never unlocks."""

    def attach(self) -> None:
        self.client = Client(self.node)
        attached = self.client.attach(layout="layout", workers=1, buckets=self.plan.buckets, deadline=1.0)
        for buffer in self.client.buffers:
            self.gpu.runtime.register(buffer.data.ctypes.data, attached.buffer_bytes)
        self.helper = Snapshotter(self.node.client(), self.state, PLACE, layout="layout", options=OPTIONS)
        self.helper.client.close()

    def again(self) -> None:
        self.client.close()
        self.attach()

    def snapshot(self) -> None:
        self.train()
        snapshot = SnapshotId("run", 1, self.step, "layout")
        part = self.client.buffers[self.client.open(snapshot, wait=True, deadline=1.0).buffer].data
        head = self.helper._head(b"meta")
        part[: len(head)] = np.frombuffer(head, np.uint8)
        for piece, at in self.plan.entries:
            source = self.state[piece.name].local.reshape(-1)
            torch.frombuffer(part[at : at + piece.bytes].data, dtype=source.dtype).copy_(source, non_blocking=True)
        self.gpu.current_stream().synchronize()
        starts = range(0, len(part), BUCKET)
        self.client.seal(snapshot, tuple(xxhash.xxh3_64_intdigest(part[at : at + BUCKET].data) for at in starts))


def test_gpu_old_order_seals_zeros() -> None:
    """What the other test guards against, in a job whose keeper is lost while training goes on."""
    with Gpu().patched() as gpu:
        rank = OldRank(gpu)
        rank.snapshot()
        rank.snapshot()
        assert rank.wrong() == []
        rank.node.lose()
        rank.again()
        assert gpu.runtime.last_error == 712
        assert rank.gpu.runtime.take_error() == 712
        rank.snapshot()
        assert len(rank.wrong()) == 1
        pieces = rank.node.sealed[-1].pieces  # the checksums are right
        assert set(pieces["w"]) == {0}


def test_gpu_no_drawn_order_seals_anything_but_the_state() -> None:
    gc.collect()  # buffers of other tests unlock their pages in the thread that drops them, on its device
    seen: Counter[str] = Counter()
    addresses: Counter[int] = Counter()
    for seed in range(ORDERS):
        rng = random.Random(seed)
        with Gpu(rng.randrange(8)).patched() as gpu:
            rank = Rank(gpu)
            for name in [*rng.choices(list(MOVE), list(MOVE.values()), k=MOVES), "snapshot"]:
                rank.move(name)
                seen[name] += 1
                addresses.update({buffer.data.ctypes.data for buffer in rank.snapshotter.client.buffers})
            assert rank.wrong() == [], seed
            assert gpu.runtime.contexts == {gpu.device.index}
            rank.snapshotter.client.close()
            rank.snapshotter.client.close()
    assert min(seen.values()) > ORDERS / 10
    assert addresses.most_common(1)[0][1] > ORDERS  # new memory does appear where the old one was
