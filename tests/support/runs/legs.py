"""A part of a run on the ranks of one layout, from one durable checkpoint to the next."""

from pathlib import Path

import torch
import torch.distributed as dist

from keepwarm.parallel.engine import StepResult
from keepwarm.trainer.checkpoint import checkpoint
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.job.sections import CheckpointSpec
from tests.support import parity
from tests.support.parity import Case, HeldShard


def train_leg(of: Case, steps: range, root: Path) -> tuple[list[StepResult], list[HeldShard]]:
    """Continue from the newest durable checkpoint, if there is one, and leave another."""
    engine = parity.make_engine(of)
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=0, device=torch.device("cpu"))
    checkpoints = Checkpoints(root, CheckpointSpec(), world, run="run", layout=str(of))
    if steps.start:
        newest = checkpoints.latest()
        assert newest is not None
        checkpoint.load(newest, engine.state())
        engine.restored()
    results = [parity.train_step(engine, of, step) for step in steps]
    checkpoints.save(steps.stop, engine.state(), {})
    shards = parity.held_shards(engine)
    engine.close()
    return results, shards
