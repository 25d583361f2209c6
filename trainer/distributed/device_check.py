"""Check the device of every rank: a matrix product and a sum over all ranks with known results. Collective.

Every value is a small whole number, so that the results are exact in every precision and on every healthy device.
"""

import torch
import torch.distributed as dist

from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.errors import DeviceBroken, RendezvousFailed

SIDE, CPU_SIDE = 2048, 256
"""Of the matrices, in numbers: powers of two, so that the product times that is exact in bf16 as well."""
COUNTED = 64
"""Ranks whose contributions to the sum differ: the sum over 80,000 ranks is exact in fp32."""
REPEATS = 16
"""Products of one measurement of a device's speed."""


def check(world: World) -> None:
    """Return if this rank's device computes a product right and all devices together a sum.

    Raises:
        DeviceBroken: this rank's device does not.
        RendezvousFailed: the sum over all ranks is wrong, whichever device or link is the cause.
    """
    for dtype in (torch.float32, torch.bfloat16):
        wrong = _wrong_numbers(world.device, dtype)
        if wrong:
            name = str(dtype).removeprefix("torch.")
            raise DeviceBroken(f"rank {world.rank}: {world.device} computes {wrong} numbers of a {name} product wrong")
    if world.size > 1:
        pattern = _pattern(SIDE, world.device, torch.float32)
        numbers = pattern * (world.rank % COUNTED + 1)
        dist.all_reduce(numbers)
        if not torch.equal(numbers, pattern * sum(rank % COUNTED + 1 for rank in range(world.size))):
            raise RendezvousFailed(
                f"rank {world.rank}: a sum over all {world.size} ranks is wrong: a device or a link between them "
                "corrupts data; `keepwarm doctor` on each node shows errors of its GPUs and of NVLink"
            )


def seconds(device: torch.device) -> float:
    """Return the time of a fixed product on a GPU, measured by the GPU; 0 on a CPU, or without memory for it.

    A slow GPU queues as fast as a healthy one: only the device itself knows how long it computes.
    """
    if device.type == "cpu":
        return 0.0
    try:
        left, right = _factors(SIDE, device, torch.bfloat16)
        times = []
        for _ in range(3):
            begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPEATS):
                torch.matmul(left, right)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
    except torch.OutOfMemoryError:
        return 0.0
    return min(times)


def _wrong_numbers(device: torch.device, dtype: torch.dtype) -> int:
    """Return how many numbers of the product differ from (i mod 3 + 1) (j mod 3 + 1) side."""
    side = CPU_SIDE if device.type == "cpu" else SIDE
    left, right = _factors(side, device, dtype)
    pattern = _pattern(side, device, dtype)
    expected = pattern[:, None] * pattern[None, :] * side
    return int((_multiply(left, right) != expected).sum())


def _factors(side: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices with alternating signs; every number of their product is a sum of equal terms."""
    pattern = _pattern(side, device, dtype)
    signs = 1 - 2 * (torch.arange(side, device=device) % 2).to(dtype)
    return pattern[:, None] * signs[None, :], signs[:, None] * pattern[None, :]


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.matmul(left, right)  # a function, as tests stand in for a device that computes wrong


def _pattern(count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(count, device=device) % 3 + 1).to(dtype)
