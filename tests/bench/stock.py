"""Training as torch's tutorials have it, restarted by stock torchrun from a DCP checkpoint: the peer of `recovery`.

    torchrun ... tests/bench/stock.py FOLDER

Nothing of keepwarm runs here but the model's numbers: `fully_shard` over all ranks, AdamW, `dcp.save` to a local disk
after every step, `dcp.load` of the newest one at a start. Rank 0 appends a line for every step.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.model.spec import ModelSpec
from tests.bench.by_hand import StageModel

STEPS = "steps.jsonl"
KEPT = 3


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    job = load_job(Path("ci/drill"), [])
    assert isinstance(job.model, ModelSpec)
    spec = job.model.model_copy(update={"max_sequence_length": job.data.sequence_length})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = StageModel(spec, range(spec.layers), first=True, last=True)
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = _load(folder, model, optimizer)
    while True:
        torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
        tokens = torch.randint(spec.vocabulary_size, (1, spec.max_sequence_length + 1))
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        _save(folder, step, model, optimizer)
        if dist.get_rank() == 0:
            with (folder / STEPS).open("a") as file:
                file.write(json.dumps({"step": step, "time": time.time(), "pid": os.getpid()}) + "\n")


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _save(folder: Path, step: int, model: Any, optimizer: Any) -> None:
    dcp.save(_state(model, optimizer), checkpoint_id=str(folder / f"step_{step}"))
    if dist.get_rank() == 0:
        old = folder / f"step_{step - KEPT}"
        if old.is_dir():
            for path in old.iterdir():
                path.unlink()
            old.rmdir()


def _load(folder: Path, model: Any, optimizer: Any) -> int:
    """The newest whole checkpoint, as rank 0 sees it: DCP writes `.metadata` last."""
    found = [int(path.parent.name.split("_")[1]) for path in folder.glob("step_*/.metadata")]
    newest = torch.tensor([max(found, default=0)])
    dist.broadcast(newest, 0)
    step = int(newest)
    if step:
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=str(folder / f"step_{step}"))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return step


if __name__ == "__main__":
    main(Path(sys.argv[1]))
