"""Copies between a GPU and the memory of a real agent."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.gpu.rows import GIB, MIB, row
from tests.support.ft.nodes import Nodes, Tensor, nodes, wait_committed

FOUND_BY_SANITIZER = 99
"""Exit code with which compute-sanitizer ends if it has found an error."""


def snapshots(device: torch.device, folder: Path) -> None:
    """Copy a state to a real agent and back, with the agent killed in between, and compare the bits."""
    _copy(device, folder, 8 * GIB if device.type != "cpu" else MIB, 8 * MIB if device.type != "cpu" else 65536)


def copies(device: torch.device, folder: Path) -> None:
    """Copy a small state, as `sanitizer` has it run."""
    _copy(device, folder, 4 * MIB, 65536)


def sanitizer(device: torch.device, folder: Path) -> None:
    """Run small copies under compute-sanitizer, if it is installed and supports the machine."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        row("compute-sanitizer", "is not installed")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND_BY_SANITIZER), "--target-processes", "all"]
    command += [sys.executable, "-m", "tests.gpu.parts", "copies", device.type]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("=========")]
    errors = next((line for line in said if "ERROR SUMMARY" in line or "Error" in line), "no summary")
    found = ended.returncode == FOUND_BY_SANITIZER
    passed = False if found else True if ended.returncode == 0 else None  # it may not support the machine
    row("copies and restores under compute-sanitizer", f"exit code {ended.returncode}: {errors}", passed=passed)


def _copy(device: torch.device, folder: Path, size: int, bucket: int) -> None:
    random = torch.Generator(device).manual_seed(3)
    tensors = [torch.randn(size // 32, generator=random, device=device) for _ in range(8)]
    expected = [one.cpu() for one in tensors]
    state = {f"t{i}": Tensor(f"t{i}", (one.numel(),), (0,), (one.numel(),), one, (0,)) for i, one in enumerate(tensors)}
    with nodes(folder, 1, state_bytes=size + 4 * bucket, bucket_bytes=bucket) as world:
        epoch = 1
        for agent in ("first", "after SIGKILL"):
            _snapshots_of_one_agent(world, state, expected, epoch, f"{agent} agent")
            epoch += 2
            world.crash(0)


def _snapshots_of_one_agent(world: Nodes, state: dict[str, Tensor], expected: Any, epoch: int, agent: str) -> None:
    (made,) = world.snapshotters([state])
    made.restore(epoch)
    for step in (1, 2, 3):
        made.offer(step, b"meta")
        made.join()
        assert made.failure is None, made.failure
        wait_committed(made)
    rate = made.timings.bytes / made.timings.copy / 1e9
    row(f"{agent}: copy and checksums of {made.timings.bytes / GIB:.2f} GiB", f"{rate:.1f} GB/s")
    on_gpu = next(iter(state.values())).local.device.type != "cpu"
    if on_gpu:
        row(f"{agent}: memory is page-locked", made.unlocked or "yes", passed=made.unlocked is None)
    for one in state.values():
        one.local.zero_()
    began = time.perf_counter()
    made.restore(epoch + 1)
    made.join()
    equal = all(torch.equal(one.local.cpu(), want) for one, want in zip(state.values(), expected, strict=True))
    row(f"{agent}: restored to the bit, in {time.perf_counter() - began:.1f} s", equal, passed=equal)
    made.client.close()
