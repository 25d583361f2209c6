"""Check this node before a run starts: `python -P -m keepwarm.launch.run.node_check RUN [HOST:PORT]`.

Prints one JSON line. Imports nothing heavy, because it runs on every node at every start.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keepwarm.launch.run import gpu_health, network_check
from keepwarm.trainer.job.run_folder import RunFolder

PACKAGES = ("keepwarm", "torch", "megatron-core", "numpy")
MARK = "keepwarm-node "
"""Prefix of the JSON line, which tells it from the output of setup commands."""
_SIZE = 256


def digest(folder: Path) -> str | None:
    """Return the digest of the spec in a run folder and of the one that a batch job proposes; None if this node sees
    no run there.
    """
    seen = hashlib.sha256()
    try:
        seen.update(RunFolder(folder).run_file.read_bytes())
        with contextlib.suppress(FileNotFoundError):
            seen.update(RunFolder(folder).submitted_file.read_bytes())
    except OSError:
        return None
    return seen.hexdigest()[:16]


def look(folder: Path, echo: str | None = None) -> dict[str, Any]:
    """Return the properties of this node, and its speed to the echo server at the address `echo` if given."""
    speed, wrong = (None, None) if echo is None else network_check.ask(echo)
    return {
        "host": socket.gethostname().partition(".")[0],
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "spec": digest(folder),
        "writable": os.access(folder, os.W_OK),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "memory_free": memory_free(),
        "disk_free": shutil.disk_usage("/tmp").free,
        "arithmetic": _arithmetic(),
        **_gpus(),
        "network": speed,
        "network_wrong": wrong,
    }


AGREE = ("spec", "python", *PACKAGES, "arithmetic", "gpus", "gpu_driver")
"""Keys that must be equal on all nodes."""


def problems(seen: dict[str, Any], wanted: dict[str, Any], memory: int = 0) -> list[str]:
    """Return why a node is unusable, given the `memory` in bytes that it must have free; empty if usable. Pure."""
    if seen["spec"] is None:
        return ["does not see the run folder: it must be on storage that all nodes share"]
    found = [f"{key} is {seen[key]}, not {wanted[key]}" for key in AGREE if seen.get(key) != wanted[key]]
    found += seen["gpu_problems"]
    if not seen["writable"]:
        found.append("cannot write to the run folder")
    if seen["memory_free"] < memory:
        found.append(f"has {seen['memory_free'] / 2**30:.1f} GiB of free memory, the run needs {memory / 2**30:.1f}")
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_count() -> int:
    """Return the number of GPUs that have a driver here, without loading a library; those of AMD count as one."""
    return len(_of_nvidia()) or int(Path("/dev/kfd").exists())


def _of_nvidia() -> list[Path]:
    return list(Path("/proc/driver/nvidia/gpus").glob("*"))


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs of NVIDIA that a process here may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not _of_nvidia():
        return [str(index) for index in range(len(_of_nvidia()))]
    return [name.strip() for name in chosen.split(",") if name.strip()]


def _gpus() -> dict[str, Any]:
    """Return what must be equal and what is wrong with this node's GPUs; without NVML only their number is known."""
    count = gpu_count()
    seen = gpu_health.look() if count else gpu_health.Gpus()
    return {
        "gpus": len(seen.gpus) if seen.gpus else count,
        "gpu_driver": seen.driver or None,
        "gpu_problems": gpu_health.problems(seen),
        "gpu_warnings": [seen.skipped] if seen.skipped else gpu_health.warnings(seen),
    }


def memory_free() -> int:
    """Return the available host memory in bytes; 0 if the kernel does not report it."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _arithmetic() -> str:
    """Return the digest of an integer matrix product, which is exact on every healthy processor and library."""
    import numpy as np

    numbers = np.arange(_SIZE * _SIZE, dtype=np.float64).reshape(_SIZE, _SIZE) % 1021
    return hashlib.sha256((numbers @ numbers.T).tobytes()).hexdigest()[:16]


def main() -> None:
    started = time.perf_counter()
    seen = look(Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else None)
    print(MARK + json.dumps(seen | {"seconds": round(time.perf_counter() - started, 3)}), flush=True)


if __name__ == "__main__":
    main()
