"""Save and load of one rank's training state against `torch.distributed.checkpoint` of the same tensors.

Prints one JSON object: medians of seconds and ratios. Every round does both, in turns; both sync their files and delete
the checkpoint of the round before, as a run does that keeps one. Ours also computes checksums, reads everything back
and compares, and publishes under the final name: all that is `save`; `save_only` is without deletion, of both. Loads
are into memory that is there already, once from the cache of the kernel and once after the files were dropped from it.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from keepwarm.ft.format import publication
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint import checkpoint
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.job.sections import CheckpointSpec
from keepwarm.trainer.model.shapes import parameter_shapes
from keepwarm.trainer.model.spec import ModelSpec

ROUNDS = 5
MODEL = ModelSpec(layers=8, hidden_size=768, heads=12, ffn_size=2048, vocabulary_size=16384, max_sequence_length=1024)


def state() -> dict[str, torch.Tensor]:
    """Weights and two moments of MODEL in fp32."""
    random = torch.Generator().manual_seed(0)
    return {
        f"{prefix}.{name}": torch.randn(shape, generator=random)
        for name, shape in parameter_shapes(MODEL).items()
        for prefix in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    }


def shards(tensors: dict[str, torch.Tensor]) -> dict[str, Shard]:
    return {
        name: Shard(
            name=name,
            global_shape=tuple(tensor.shape),
            offsets=(0,) * tensor.ndim,
            shape=tuple(tensor.shape),
            local=tensor,
            replicas=(0,),
        )
        for name, tensor in tensors.items()
    }


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def drop(folder: Path) -> None:
    """Let the kernel forget the files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    warnings.simplefilter("ignore")
    tensors = state()
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    found: dict[str, list[float]] = {}

    def note(what: str, action: Callable[[], object]) -> None:
        found.setdefault(what, []).append(seconds(action))

    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as name:
        root = Path(name)
        for step in range(ROUNDS + 1):
            if step == 1:
                found.clear()  # the first round had nothing to delete
            ours = Checkpoints(root / "ours", CheckpointSpec(keep=2), world, run="run", layout="any")
            old, new = root / f"theirs-{step - 1}", root / f"theirs-{step}"
            note("save_only", lambda ours=ours, step=step: ours.save(step + 1, shards(tensors), {}))
            note("deletion", lambda: publication.prune(root / "ours", 1))
            note("save_only_dcp", lambda new=new: dcp.save(dict(tensors), checkpoint_id=new, no_dist=True))
            note("deletion_dcp", lambda old=old: shutil.rmtree(old, ignore_errors=True))
            path = ours.latest()
            assert path is not None
            note("load", lambda path=path: checkpoint.load(path, shards(into)))
            assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())
            note("load_dcp", lambda new=new: dcp.load(into, checkpoint_id=new, no_dist=True))
            drop(root)
            note("load_cold", lambda path=path: checkpoint.load(path, shards(into)))
            note("load_cold_dcp", lambda new=new: dcp.load(into, checkpoint_id=new, no_dist=True))
    for side in ("", "_dcp"):
        found[f"save{side}"] = list(map(sum, zip(found[f"save_only{side}"], found[f"deletion{side}"], strict=True)))
    middle = {what: statistics.median(times) for what, times in found.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    ratios = {what: middle[f"{what}_dcp"] / middle[what] for what in ("save", "save_only", "load", "load_cold")}
    print(json.dumps({"bytes": size, "seconds": middle, "times_faster_than_dcp": ratios}, indent=1))


if __name__ == "__main__":
    main()
