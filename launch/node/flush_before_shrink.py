"""Flush memory to disk before a run goes on with fewer slots, including the memory that lost nodes held.

Snapshots are coded for the layout that ends, and the next layout cannot read them in place. So every vacant slot gets
a substitute agent on this node, the group decodes its memory as it does for a spare, and all agents write their parts
as for a durable checkpoint. Only what was not committed is lost.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.launch.node.snapshot_agent import SnapshotAgent

DISK_POLL_INTERVAL_S = 0.05
NOT_NEEDED = "the nodes have changed, or this one was asked to end"


def flush_to_disk(
    agent: SnapshotAgent, substitutes: Sequence[SnapshotAgent], checkpoints: Path, *,
    save_elsewhere: Callable[[int], None], still_needed: Callable[[], bool], deadline: float,
) -> int | str:  # fmt: skip
    """Return the step that is on disk; else the reason why memory could not be saved.

    Args:
        agent: this node's.
        substitutes: agents for the vacant slots, not yet started; they are killed in the end.
        checkpoints: folder in which agents publish.
        save_elsewhere: called with the epoch that the agents of all other nodes must write.
        still_needed: return False once there is no point in going on.
        deadline: seconds for all of it.
    """
    end = time.monotonic() + deadline
    try:
        for substitute in substitutes:
            substitute.ensure()
        epoch = agent.begin_epoch()
        if epoch is None:
            return "no agent is running"
        step = 0
        for one in (agent, *substitutes):
            while (decision := one.decision(epoch)) is None:
                if not still_needed():
                    return NOT_NEEDED
                if time.monotonic() > end:
                    return f"memory was not complete after {deadline:g} s"
                time.sleep(DISK_POLL_INTERVAL_S)
            if isinstance(decision, str):
                return decision
            step = decision[1]
        save_elsewhere(epoch)
        for one in (agent, *substitutes):
            one.save(epoch)
        while not _published(checkpoints, step):
            if not still_needed():
                return NOT_NEEDED
            if time.monotonic() > end:
                return f"step {step} was not on disk after {deadline:g} s"
            time.sleep(DISK_POLL_INTERVAL_S)
        return step
    except (FtError, OSError) as error:
        return str(error)
    finally:
        for substitute in substitutes:
            substitute.kill()


def newest_step(checkpoints: Path) -> int:
    """Return the step of the newest durable checkpoint; -1 if there is none.

    Raises OSError.
    """
    with contextlib.suppress(FtError):
        newest = publication.latest(checkpoints)
        return -1 if newest is None else read_manifest(newest).step
    return -1


def _published(checkpoints: Path, step: int) -> bool:
    with contextlib.suppress(OSError):
        return newest_step(checkpoints) >= step
    return False
