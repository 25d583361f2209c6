"""Snapshots of tensors on a GPU, by a stand-in: what is sealed is the state, or nothing is sealed."""

import gc
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.ft.errors import DeviceMissedMemory
from keepwarm.ft.memory import mapping
from keepwarm.ft.worker import snapshotter
from keepwarm.ft.worker.snapshotter import Restoration, SnapshotOptions, Snapshotter, plan_part
from tests.gpu_stand_in.device import Gpu, inside
from tests.gpu_stand_in.node import BUCKET, PLACE, Node
from tests.gpu_stand_in.runtime import REGISTER, UNREGISTER
from tests.support.ft.nodes import Tensor, nodes, random_state, wait_committed

META = 64
OPTIONS = SnapshotOptions(meta_bytes=META, deadline=30.0)
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with Gpu(5).patched() as gpu:
        yield gpu


def shards(*tensors: torch.Tensor) -> dict[str, Tensor]:
    return {
        f"t{i}": Tensor(f"t{i}", tuple(one.shape), (0,) * one.dim(), tuple(one.shape), one, (0,))
        for i, one in enumerate(tensors)
    }


def plain_state() -> list[torch.Tensor]:
    """Six buckets, pieces that cross their borders, an empty tensor and a single number."""
    random = torch.Generator().manual_seed(7)
    return [
        torch.randn(3001, generator=random),
        torch.empty(0),
        torch.randn(40, 50, generator=random).bfloat16().t(),
        torch.tensor(5),
        torch.randn(900, generator=random),
    ]


def snapshotter_of(node: Node, state: dict[str, Tensor]) -> Snapshotter:
    return Snapshotter(node.client(), state, PLACE, layout="layout", options=OPTIONS)


def node_of(state: dict[str, Tensor], before: int = 0) -> Node:
    return Node(plan_part(state, 0, BUCKET, meta_bytes=META).buckets, before)


def take(snapshotter: Snapshotter, step: int) -> BaseException | None:
    snapshotter.offer(step, b"meta")
    snapshotter.join()
    return snapshotter.failure


def contents(tensors: list[torch.Tensor]) -> dict[str, bytes]:
    return {f"t{i}": one.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for i, one in enumerate(tensors)}


def held(state: dict[str, Tensor]) -> dict[str, bytes]:
    """What a state on the GPU holds."""
    return contents([inside(shard.local) for shard in state.values()])


@st.composite
def tensors(draw: st.DrawFn) -> list[torch.Tensor]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        shape = draw(st.sampled_from([(), (0,), (1,), (3,), (0, 4), (5, 7), (64,), (1024,), (4097,), (90, 130)]))
        values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        one = values.to(draw(st.sampled_from(DTYPES)))
        found.append(one.t() if one.dim() == 2 and draw(st.booleans()) else one)
    return found


@given(tensors(), st.booleans(), st.integers(0, 2))
def test_gpu_copy_equals_that_of_a_cpu(state: list[torch.Tensor], refused: bool, before: int) -> None:
    sealed = []
    with Gpu().patched() as gpu:
        if refused:
            gpu.runtime.fail(REGISTER, 2)
        for each in (shards(*state), shards(*map(gpu.tensor, state))):
            node = node_of(each, before)
            made = snapshotter_of(node, each)
            assert take(made, 1) is None
            sealed += node.sealed
            assert (made.unlocked is not None) == (refused and each["t0"].local.is_cuda)
            made.client.close()
        assert gpu.runtime.locked_bytes == 0
    assert sealed[0].pieces == sealed[1].pieces == contents(state)
    assert sealed[0].sums == sealed[1].sums
    assert np.array_equal(sealed[0].data, sealed[1].data)


def test_gpu_copy_mixed_with_tensors_on_the_cpu(gpu: Gpu) -> None:
    on_cpu = plain_state()
    state = shards(*(one if i % 2 else gpu.tensor(one) for i, one in enumerate(on_cpu)))
    node = node_of(state)
    assert take(snapshotter_of(node, state), 1) is None
    assert node.sealed[0].pieces == contents(on_cpu)


def test_gpu_copy_is_absent_until_it_is_waited_for(gpu: Gpu) -> None:
    """The stand-in itself: else a copy that nobody waits for would pass."""
    host = torch.zeros(8, pin_memory=True)
    host.copy_(gpu.tensor(torch.ones(8)), non_blocking=True)
    assert host.sum() == 0
    gpu.current_stream().synchronize()
    assert host.sum() == 8


def test_gpu_copy_touches_no_other_gpu(gpu: Gpu) -> None:
    """A thread begins on device 0, and leaving a stream there makes a context on it, in every rank of a node."""
    state = shards(*map(gpu.tensor, plain_state()))
    made = snapshotter_of(node_of(state), state)
    assert take(made, 1) is None
    made.client.close()
    assert gpu.runtime.contexts == {5}


def test_gpu_copy_locks_this_ranks_part_alone_until_the_memory_is_unmapped(gpu: Gpu) -> None:
    state = shards(*map(gpu.tensor, plain_state()))
    made = snapshotter_of(node_of(state, before=3), state)
    for step in (1, 2, 3):
        assert take(made, step) is None
    assert gpu.runtime.locked_bytes == 2 * made.plan.size
    view = made.client.buffers[0].data
    made.client.close()
    assert gpu.runtime.locked_bytes == 0
    assert view[0] is not None  # a view that is left keeps the mapping, not the lock


def test_gpu_copy_lock_ends_with_memory_that_nobody_closes(gpu: Gpu) -> None:
    state = shards(*map(gpu.tensor, plain_state()))
    made = snapshotter_of(node_of(state), state)
    assert take(made, 1) is None
    assert gpu.runtime.locked_bytes
    del made
    gc.collect()
    assert gpu.runtime.locked_bytes == 0


@pytest.mark.parametrize("after", [0, 1, 3])
def test_gpu_copy_refused_lock_is_ended_and_copies_take_another_way(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(snapshotter, "LOCK_STEP", BUCKET)
    state = shards(*map(gpu.tensor, plain_state()))
    node = node_of(state)
    made = snapshotter_of(node, state)
    assert made.plan.buckets > after
    gpu.runtime.fail(REGISTER, 2, after=after)
    for step in (1, 2, 3):
        inside(state["t0"].local).add_(1)
        assert take(made, step) is None  # the error that CUDA keeps for the next kernel is gone too
        assert node.sealed[-1].pieces == held(state)
    assert gpu.runtime.locked_bytes == 0
    assert "error 2, out of memory" in str(made.unlocked)


def test_gpu_copy_memory_whose_lock_does_not_end_keeps_its_address(gpu: Gpu) -> None:
    state = shards(*map(gpu.tensor, plain_state()))
    node = node_of(state)
    made = snapshotter_of(node, state)
    assert [take(made, step) for step in (1, 2)] == [None, None]
    addresses = {buffer.data.ctypes.data for buffer in made.client.buffers}
    gpu.runtime.fail(UNREGISTER, 719, times=100)
    made.client.close()
    assert gpu.runtime.last_error == 0
    assert gpu.runtime.locked_bytes == 2 * made.plan.size
    del made
    node.lose()
    made = snapshotter_of(node, state)
    inside(state["t0"].local).add_(1)
    assert take(made, 3) is None
    assert node.sealed[-1].pieces == held(state)
    assert not addresses & {buffer.data.ctypes.data for buffer in made.client.buffers}


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("number", [0, 1, 4, 9, 11])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), MemoryError(), ValueError("odd")])
def test_gpu_copy_that_raises_gives_the_buffer_back_and_the_next_succeeds(
    gpu: Gpu, locked: bool, number: int, error: Exception
) -> None:
    state = shards(*map(gpu.tensor, plain_state()))
    node = node_of(state)
    made = snapshotter_of(node, state)
    if not locked:
        gpu.runtime.fail(REGISTER, 2)
    count = iter(range(1000))

    def fail() -> None:
        if next(count) == number:
            raise error

    idle = []
    gpu.before_copy, node.on_cancel = fail, lambda: idle.append(gpu.idle)
    assert take(made, 1) is error
    # Not before the GPU writes to the buffer no more.
    assert idle == [True]
    assert (node.sealed, len(node.cancelled)) == ([], 1)
    inside(state["t0"].local).add_(1)
    assert take(made, 2) is None
    assert node.sealed[0].pieces == held(state)


def stepped(restored: Restoration | str) -> int:
    assert not isinstance(restored, str), restored
    return restored.step


def remap(address: int, size: int) -> None:
    """Put new memory at an address, as after an unmapping that the CUDA runtime is not told of."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mapping._FIXED
    mapping._map(address, size, mapping._READ_WRITE, private, -1)


@pytest.mark.parametrize("state", [plain_state(), [torch.tensor(0, dtype=torch.uint8)], [torch.zeros(3000)]])
def test_gpu_copy_that_misses_the_memory_is_never_sealed(gpu: Gpu, state: list[torch.Tensor]) -> None:
    """Zeros of the GPU must not pass for memory that happens to hold zeros."""
    on_gpu = shards(*map(gpu.tensor, state))
    node = node_of(on_gpu)
    made = snapshotter_of(node, on_gpu)
    assert [take(made, step) for step in (1, 2)] == [None, None]
    for buffer in made.client.buffers:
        remap(buffer.data.ctypes.data, buffer.size)
    failure = take(made, 3)
    assert isinstance(failure, DeviceMissedMemory)
    assert len(node.sealed) == 2
    assert take(made, 4) is None
    assert node.sealed[-1].pieces == contents(state)
    assert made.unlocked is failure


def test_gpu_copy_failure_is_kept_until_a_snapshot_is_sealed(gpu: Gpu) -> None:
    """The loop asks after it has offered the next snapshot: that must not hide why the last one failed."""
    state = shards(gpu.tensor(torch.randn(100)))
    node = node_of(state)
    made = snapshotter_of(node, state)
    gpu.before_copy = lambda: 1 / 0
    assert isinstance(take(made, 1), ZeroDivisionError)
    going_on = threading.Event()
    gpu.before_copy = lambda: going_on.wait(30.0)
    made.offer(2, b"")
    assert isinstance(made.failure, ZeroDivisionError)
    going_on.set()
    made.join()
    assert made.failure is None


def test_gpu_state_survives_agents_in_the_same_process(gpu: Gpu, tmp_path: Path) -> None:
    """Real agents: one that its keeper starts again has the same memory, the one after a lost keeper has new memory."""
    state = random_state(0, 1)
    for shard in state.values():
        shard.local = gpu.tensor(shard.local)
    values = held(state)
    with nodes(tmp_path, 1) as world:
        (made,) = world.snapshotters([state])
        made.restore(1)
        for step in (10, 11):
            made.offer(step, b"meta")
            made.join()
            wait_committed(made)
        world.crash(0)
        made.client.close()
        (made,) = world.snapshotters([state])
        for shard in state.values():
            inside(shard.local).zero_()
        assert stepped(made.restore(2)) == 11
        made.join()
        assert held(state) == values
        made.offer(12, b"meta")
        made.join()
        wait_committed(made)
        world.kill(0)
        made.client.close()
        world.start(0)
        (made,) = world.snapshotters([state])
        assert made.restore(3) == "no agent holds a snapshot in memory"
        made.offer(50, b"meta")
        made.join()
        wait_committed(made)
        made.client.close()
        for shard in state.values():
            inside(shard.local).zero_()
        (made,) = world.snapshotters([state])
        assert stepped(made.restore(4)) == 50
        made.join()
        assert held(state) == values
        made.client.close()
    assert gpu.runtime.locked_bytes == 0
    assert gpu.runtime.contexts == {5}
