"""Choose where a run starts: fresh, from the agents' memory, or from the newest durable checkpoint."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from keepwarm.files import within
from keepwarm.ft.errors import DurableError
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import Manifest, read_manifest
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint import checkpoint
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.convert.native import with_older
from keepwarm.trainer.distributed.in_process_restart import RECOVERY
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.loop.snapshots import MemoryTier
from keepwarm.trainer.monitor import events

DISK_PATIENCE_S = 5.0
"""How long ranks that have restored from memory wait to learn whether the disk has something newer, in seconds."""
MEMORY_IS_OLDER = "the newest checkpoint on disk is newer than the snapshot in memory"

Start = Literal["fresh", "resume", "restart"]
"""fresh: a new run; resume: continued by a user, so saved state must exist; restart: restarted by a launcher."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The state that was restored into the live shards, and why it was chosen."""

    source: Literal["nothing", "memory", "disk"]
    reason: str
    step: int = 0
    meta: dict[str, Any] | None = None


def begin(
    start: Start, shards: Mapping[str, Shard], checkpoints: Checkpoints, memory: MemoryTier, world: World
) -> Beginning:
    """Fill the shards from the newest available state. Collective; all ranks reach the same decision.

    In a run with supervisors, rank 0 writes the event `recovery` once the first step afterwards is done.

    Raises:
        CheckpointError: a user wants to resume and there is no saved state, or it does not fit.
        RestoreFailed: agents or peers were lost meanwhile; another start may succeed.
    """
    entered = time.time()
    if start == "fresh":
        memory.begin_fresh()
        return Beginning(source="nothing", reason="a fresh run")
    beginning = _fill(start, shards, checkpoints, memory, world)
    if start == "restart":
        names = ("fetch", "decode", "verify")
        slowest = {name: world.largest(round(1e6 * memory.phases.get(name, 0.0))) / 1e6 for name in names}
        request = os.environ.get(RECOVERY)
        if request is not None and world.rank == 0:
            if beginning.source != "memory":
                slowest["fetch"] = max(slowest["fetch"], time.time() - entered - sum(slowest.values()))
            folder = checkpoints.root.parent
            memory.when_resumed(partial(_report, json.loads(request), folder, beginning, memory, entered, slowest))
    return beginning


def _report(
    request: dict[str, Any], folder: Path, beginning: Beginning, memory: MemoryTier, entered: float,
    slowest: dict[str, float],
) -> None:  # fmt: skip
    """Record what was recovered, its source and the time by phase; `resume` covers the first step and any remaining
    time.
    """
    now = time.time()
    start = max(0.0, entered - request["started"])
    phases = request["phases"] | {"start": start} | slowest
    phases["resume"] = max(0.0, now - entered - sum(slowest.values()))
    from_memory = beginning.source == "memory"
    decoded = memory.decoded() if from_memory else 0
    why = request["why"] if from_memory else f"{request['why']}; {beginning.reason}"
    recovery = events.Recovery(
        level=_level(request["level"], beginning.source, decoded),
        why=why,
        slots=tuple(request["slots"]),
        source=beginning.source,
        step=beginning.step,
        bytes_decoded=decoded,
        phases=phases,
    )
    events.record(folder, recovery)


def _level(expected: events.Level, source: str, decoded: int) -> events.Level:
    """Return the level of a recovery. Supervisors expect one by the nodes that were lost; memory may be lost alone."""
    if expected == "resized" or source == "memory":
        return "decoded" if expected == "local" and decoded else expected
    return "disk"


def _fill(
    start: Start, shards: Mapping[str, Shard], checkpoints: Checkpoints, memory: MemoryTier, world: World
) -> Beginning:
    """Restore from memory, or from disk if that is newer."""
    restored = memory.restore()
    from_memory = None if isinstance(restored, str) else (restored.epoch, restored.step)
    newest = _newest_on_disk(checkpoints, world, needed=from_memory is None)
    if newest is not None and (from_memory is None or newest[1] > from_memory):
        meta = checkpoint.load(newest[0], shards)
        reason = restored if isinstance(restored, str) else MEMORY_IS_OLDER
        return Beginning(source="disk", reason=reason, step=newest[1][1], meta=meta)
    if isinstance(restored, str):
        if start == "resume":
            raise CheckpointError(
                f"nothing to resume from: {checkpoints.root} has no complete checkpoint, and {restored}; use --force"
            )
        return Beginning(source="nothing", reason=restored)
    where = "this node's memory" if restored.local else "the memory of this node and its peers"
    return Beginning(
        source="memory", reason=f"committed snapshot in {where}", step=restored.step, meta=json.loads(restored.meta)
    )


def _newest_on_disk(
    checkpoints: Checkpoints, world: World, *, needed: bool
) -> tuple[Path, tuple[int, int]] | None:  # fmt: skip
    """Return the newest complete checkpoint and its (epoch, step), as seen by rank 0: agents may publish more.

    Unless it is `needed`, a disk that does not answer within `DISK_PATIENCE_S` counts as one without a checkpoint.
    """

    def look() -> tuple[int, int]:
        path = checkpoints.latest()
        manifest = None if path is None else _manifest(path)
        return (-1, -1) if manifest is None else (manifest.epoch, manifest.step)

    seen = None
    if world.rank == 0:
        seen = look() if needed else within(look, DISK_PATIENCE_S)
    epoch, step = (world.largest(number) for number in seen or (-1, -1))
    return None if step < 0 else (publication.folder(checkpoints.root, step), (epoch, step))


def _manifest(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except DurableError as error:
        raise CheckpointError(with_older(error, path)) from error
