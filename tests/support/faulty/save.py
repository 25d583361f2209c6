"""Save a checkpoint with a fault at every write, sync, rename and deletion in turn; run as a process of its own.

    python -m tests.support.faulty.save kill|error new|same FOLDER

FOLDER has two checkpoints at first; a third is saved (`new`), or the second once more in a later epoch (`same`). Prints
how many faults there were. Fails when after one of them the newest checkpoint is older than before or not whole, or
anything under a final name is not whole, or the next save does not succeed.
"""

import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.job.sections import CheckpointSpec
from tests.support.faulty.conversion import Faults, in_child

OPERATIONS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def save(root: Path, step: int, epoch: int = 0) -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    saver = Checkpoints(root, CheckpointSpec(keep=2), world, run="run", layout="any")
    saver.epoch = epoch
    shards = {
        name: Shard(
            name=name,
            global_shape=(64,),
            offsets=(0,),
            shape=(64,),
            local=torch.full((64,), float(step)),
            replicas=(0,),
        )
        for name in ("model.a", "model.b")
    }
    saver.save(step, shards, {"epoch": epoch})


def whole(root: Path, step: int) -> None:
    """Raises unless all that has a final name is whole, and the newest is of `step` or later."""
    newest = publication.latest(root)
    assert newest is not None
    assert publication.verify(newest).step >= step
    for path in root.glob("iter_*"):
        publication.verify(path)


def main(kind: str, what: str, folder: Path) -> int:
    before = folder / "before"
    for step in (1, 2):
        save(before, step)
    for at in range(1, 10_000):
        root = folder / "root"
        shutil.copytree(before, root)
        saving = partial(save, root, *((3, 0) if what == "new" else (2, 1)))
        status = in_child(saving, Faults(at, kind, OPERATIONS))
        # A fault in deleting what nobody needs any more may be survived.
        assert status in (0, 1, 4) if kind == "error" else status in (0, -9), f"fault {at} ended with {status}"
        whole(root, 2)
        if status == 0:
            break
        save(root, 4, epoch=2)
        whole(root, 4)
        publication.sweep(root)
        assert not list(root.glob("tmp-*")), f"fault {at} left {list(root.iterdir())}"
        shutil.rmtree(root)
    assert read_manifest(publication.latest(root) or root).meta["epoch"] == (0 if what == "new" else 1)
    return at - 1


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
