"""Where a run begins: anew, from the agents' memory, or from the newest durable checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ft import durable
from ft.errors import FtError
from parallel.shard import Shard
from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.errors import CheckpointError
from trainer.snapshots import Snapshots
from trainer.world import World

Start = Literal["anew", "resume", "restart"]
"""anew: a fresh run; resume: a user continues it, so there must be something; restart: a launcher started it again."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What was written into the live shards, and why from there."""

    source: Literal["nothing", "memory", "disk"]
    reason: str
    step: int = 0
    meta: dict[str, Any] | None = None


def begin(
    start: Start, shards: Mapping[str, Shard], checkpoints: Checkpoints, snapshots: Snapshots | None, world: World
) -> Beginning:
    """Fill the shards from the newest state there is. Collective, and decided alike on every rank.

    Raises:
        CheckpointError: a user wants to resume and there is nothing, or it does not fit.
    """
    reason = "no snapshots in memory: snapshot is off"
    in_memory: tuple[int, int] | None = None
    found = Beginning(source="nothing", reason="a fresh run")
    if snapshots is not None:
        try:
            restored = snapshots.restore()
        except FtError as error:
            raise CheckpointError(f"rank {world.rank}: restoring from memory failed: {error}") from error
        if isinstance(restored, str):
            reason = restored
        else:
            in_memory = restored.epoch, restored.step
            where = "this node's memory" if restored.local else "the memory of this node and its peers"
            meta = json.loads(restored.meta)
            found = Beginning(source="memory", reason=f"committed snapshot in {where}", step=restored.step, meta=meta)
    if start == "anew":
        return Beginning(source="nothing", reason="a fresh run")
    newest = _newest_on_disk(checkpoints, world)
    if newest is not None and (in_memory is None or newest[1] > in_memory):
        meta = checkpoint.load(newest[0], shards)
        return Beginning(source="disk", reason=reason, step=newest[1][1], meta=meta)
    if found.source == "nothing" and start == "resume":
        raise CheckpointError(
            f"nothing to resume from: {checkpoints.root} holds no complete checkpoint, and {reason}; use --force"
        )
    return found if found.source == "memory" else Beginning(source="nothing", reason=reason)


def _newest_on_disk(checkpoints: Checkpoints, world: World) -> tuple[Path, tuple[int, int]] | None:
    """The newest complete checkpoint and its (epoch, step), as rank 0 sees it: agents may publish another meanwhile."""
    path = checkpoints.latest() if world.rank == 0 else None
    step = world.largest(-1 if path is None else durable.read_manifest(path).step)
    if step < 0:
        return None
    agreed = durable.folder(checkpoints.root, step)
    return agreed, (durable.read_manifest(agreed).epoch, step)
