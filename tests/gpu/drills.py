"""Processes that die while a GPU trains: the run must end with the bits of one in which none did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.gpu.one_gpu import environment
from tests.gpu.rows import TINY, row, small

SNAPSHOTS = "snapshot={every: 1, bucket: 65536}"
TWO_NODES = ("parallel.data=2", "parallel.data_mode=ddp", "cluster.ranks_per_node=1")
NODES = 3
"""Of the drill that loses one of two nodes, with its spare."""


def worker(device: torch.device, folder: Path) -> None:
    """Kill the one rank of a run, which goes on from its node's memory."""
    _drill("worker killed", device, folder, ["--kill", "worker:0@3"], {})


def node(device: torch.device, folder: Path) -> None:
    """Kill one of two nodes; all on one GPU where there are fewer than nodes and spares."""
    alone = device.type == "cpu" or torch.cuda.device_count() < NODES
    where = "on one GPU through gloo" if alone else "through NCCL"
    more = environment(folder) if alone else {}
    _drill(f"node of two killed, {where}", device, folder, [*TWO_NODES, "--kill", "node:1@3"], more)


def _drill(what: str, device: torch.device, folder: Path, arguments: list[str], more: dict[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "keepwarm", "drill", str(TINY), *small(folder / "drill", device), SNAPSHOTS]
    ended = subprocess.run(
        [*command, *arguments, "--json"], env=os.environ | more, capture_output=True, text=True, check=False
    )
    if not ended.stdout.startswith("{"):
        last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "")
        row(what, f"ended with {ended.returncode}: {last[:200]}", passed=False)
        return
    found = json.loads(ended.stdout)
    for fault in found["faults"]:
        level, seconds, lost = fault["level"], fault["total_s"], fault["steps_lost"]
        row(f"{what}: restored from {level}", f"{seconds:.1f} s, {lost} steps lost", passed=level is not None)
    row(f"{what}: losses and state are equal to the bit", found["bitwise_equal"], passed=found["bitwise_equal"])
