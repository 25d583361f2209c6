"""Losses of the tiny job: the same again, near those of the CPU, of compiled layers, and of two ranks on one GPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.gpu.one_gpu import environment
from tests.gpu.rows import TINY, compare, losses, losses_of, row, small


def training(device: torch.device, folder: Path) -> None:
    """Train the tiny job twice with the same bits, and near those of the CPU."""
    first, second = (losses(folder / name, device) for name in ("first", "second"))
    equal = torch.equal(first, second)
    row("losses of two runs are equal to the bit", equal, passed=equal)
    compare("on this device and on the CPU", first, losses(folder / "cpu", torch.device("cpu")))


def compiled(device: torch.device, folder: Path) -> None:
    """Train the tiny job with and without compiled layers and masks between documents; on the CPU, twice without."""
    compile_ = f"numerics.compile={str(device.type != 'cpu').lower()}"
    for mask in ("false", "true"):
        more = f"data.document_mask={mask}"
        eager = losses(folder / f"eager-{mask}", device, more)
        compare(f"compiled and not, document_mask: {mask}", eager, losses(folder / mask, device, more, compile_))


def two_ranks(device: torch.device, folder: Path) -> None:
    """Train with two ranks that share one GPU, through gloo, and compare with one rank."""
    alone = losses(folder / "one", device)
    for mode in ("ddp", "fsdp"):
        output = folder / mode
        shape = ["parallel.data=2", f"parallel.data_mode={mode}"]
        command = [sys.executable, "-P", "-m", "keepwarm", "train", str(TINY), *small(output, device), *shape]
        ended = subprocess.run(
            command, env=os.environ | environment(folder), capture_output=True, text=True, check=False
        )
        if ended.returncode:
            last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "")
            row(f"two ranks on one GPU, {mode}", f"ended with {ended.returncode}: {last[:200]}", passed=False)
        else:
            compare(f"of one rank and of two on one GPU, {mode}", alone, losses_of(output))
