"""What `tests/gpu/run.py` measures on a GPU, one function a part; each prints its rows as JSON as they come.

`python -m tests.gpu.parts PART cuda|cpu` runs one of them; on the CPU with sizes that exercise the code alone.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.gpu import drills, speed, state, training

PARTS: dict[str, Callable[[torch.device, Path], None]] = {
    "snapshots": state.snapshots,
    "training": training.training,
    "worker killed": drills.worker,
    "1B": speed.one_billion,
    "8B": speed.eight_billion,
    "compiled": training.compiled,
    "two ranks": training.two_ranks,
    "node killed": drills.node,
    "sanitizer": state.sanitizer,
    "copies": state.copies,
}
"""The most telling first; `copies` is what `sanitizer` runs."""


def main(name: str, kind: str) -> None:
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, 0)
    with tempfile.TemporaryDirectory(prefix="gpu", ignore_cleanup_errors=True) as folder:
        PARTS[name](device, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
