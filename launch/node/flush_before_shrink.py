"""Before a run goes on with fewer slots: what lies in memory is written to disk, what lost nodes held included.

Snapshots are coded for the layout that ends, and the next one cannot read them where they are. So every vacant slot
gets an agent on this node, the group decodes its memory as it does for a spare, and all agents write their parts, as
they do those of a durable snapshot. Then nothing is lost but what was not committed.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from keepwarm.ft.errors import FtError
from keepwarm.ft.format import checkpoint
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.launch.node.snapshot_agent import SnapshotAgent

DISK_POLL_INTERVAL_S = 0.05
CHANGED = "the nodes have changed meanwhile, or this one was asked to end"


def rescue(
    agent: SnapshotAgent, substitutes: Sequence[SnapshotAgent], checkpoints: Path, *, everyone: Callable[[int], None],
    needed: Callable[[], bool], deadline: float,
) -> int | str:  # fmt: skip
    """The step that is on disk when this returns; else why memory could not be saved.

    Args:
        agent: this node's.
        substitutes: agents for the vacant slots, not yet started; they are killed in the end.
        checkpoints: where agents publish.
        everyone: called with the epoch that the agents of all nodes are to write.
        needed: False once nobody needs this any more.
        deadline: seconds for all of it.
    """
    end = time.monotonic() + deadline
    try:
        for substitute in substitutes:
            substitute.ensure()
        epoch = agent.begin_epoch()
        if epoch is None:
            return "no agent runs"
        step = 0
        for one in (agent, *substitutes):
            while (found := one.decided(epoch)) is None:
                if not needed():
                    return CHANGED
                if time.monotonic() > end:
                    return f"memory was not whole after {deadline:g} s"
                time.sleep(DISK_POLL_INTERVAL_S)
            if isinstance(found, str):
                return found
            step = found[1]
        everyone(epoch)
        for one in (agent, *substitutes):
            one.save(epoch)
        while not _published(checkpoints, step):
            if not needed():
                return CHANGED
            if time.monotonic() > end:
                return f"step {step} was not on disk after {deadline:g} s"
            time.sleep(DISK_POLL_INTERVAL_S)
        return step
    except FtError as error:
        return str(error)
    finally:
        for substitute in substitutes:
            substitute.kill()


def _published(checkpoints: Path, step: int) -> bool:
    with contextlib.suppress(FtError, OSError):
        newest = checkpoint.latest(checkpoints)
        return newest is not None and read_manifest(newest).step >= step
    return False
