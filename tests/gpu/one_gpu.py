"""Let ranks share one GPU: gloo in place of NCCL, which refuses that, and GPUs that cannot be told apart.

torch calls `share` when it is imported, in every process that has `environment`: an entry point for devices.
"""

import os
from pathlib import Path
from typing import Any

ENTRY = "[torch.backends]\none_gpu = tests.gpu.one_gpu:share\n"


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of processes that are to share a GPU: launchers count it eight times."""
    information = folder / "entry" / "one_gpu-1.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: one_gpu\nVersion: 1\n")
    (information / "entry_points.txt").write_text(ENTRY)
    paths = [str(information.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    first, *_ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    return {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ",".join([first] * 8)}


class Nameless:
    """The properties of a GPU but for what identifies it."""

    def __init__(self, properties: object) -> None:
        self._properties = properties

    def __getattr__(self, name: str) -> Any:
        if name == "uuid":
            raise AttributeError(name)
        return getattr(self._properties, name)


def share() -> None:
    # CUDA finds no GPU at all where one is listed twice.
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")))
    import torch
    import torch.distributed as dist

    connect, group, properties = dist.init_process_group, dist.new_group, torch.cuda.get_device_properties

    def init_process_group(backend: str, **options: Any) -> None:
        connect("gloo", **(options | {"device_id": None}))

    def new_group(ranks: Any = None, **options: Any) -> Any:
        return group(ranks, **(options | {"backend": "gloo"}))

    dist.init_process_group, dist.new_group = init_process_group, new_group  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device=None: Nameless(properties(device))  # type: ignore[assignment, return-value]
