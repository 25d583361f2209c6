"""What an agent writes down about its memory, and the state of the next agent that finds it. Pure.

An agent that takes over the memory of a dead one makes no promise of its own before an epoch is decided: it is another
incarnation, so the others ignore it until then, and it reports what it has found like any other inventory. It takes
part in the epoch in which the other one died if that was not decided: without its inventory there might be no choice.
Snapshots that were being written are given up; their buffers stay in use until no worker writes to them any more. Of
snapshots that could be restored, everything is kept that was known to be good. All of it is compared with its checksums
before the epoch's choice.
"""

from collections.abc import Sequence
from operator import attrgetter

import msgspec
from msgspec.structs import replace

from keepwarm.ft.protocol.messages import ChunkRecord, SnapshotId, Undecodable
from keepwarm.ft.protocol.state import Copy, Geometry, Phase, State


class KeptCopy(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot in the memory, with the fields of `keepwarm.ft.protocol.state.Copy` that outlive an agent."""

    snapshot: SnapshotId
    geometry: Geometry
    phase: Phase
    data: int | None
    parity: int | None
    writers: frozenset[int]
    sums: dict[int, tuple[int, ...]]
    rebuilt: dict[int, tuple[int, ...]]
    whole: bool
    restored: bool
    good: dict[int, ChunkRecord]


class KeptMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent knew about its memory."""

    incarnation: int
    epoch: int
    decided_epoch: int
    copies: tuple[KeptCopy, ...]
    undecodable: tuple[Undecodable, ...]


def kept(state: State) -> KeptMemory:
    """Return what is to be written down of a state."""
    copies = tuple(
        KeptCopy(
            snapshot=copy.snapshot, geometry=copy.geometry, phase=copy.phase, data=copy.data, parity=copy.parity,
            writers=copy.writers, sums=dict(copy.sums), rebuilt=dict(copy.rebuilt), whole=copy.whole,
            restored=copy.restored, good=dict(copy.good),
        )
        for copy in state.copies
    )  # fmt: skip
    return KeptMemory(
        incarnation=state.incarnation, epoch=state.epoch, decided_epoch=state.decided_epoch, copies=copies,
        undecodable=tuple(state.undecodable),
    )  # fmt: skip


def same(one: State, other: State) -> bool:
    """Return whether `kept` returns the same for both. Mappings are compared by identity, as they are never modified.

    What changes with every bucket is not part of it.
    """
    if (
        (one.epoch, one.decided_epoch) != (other.epoch, other.decided_epoch)
        or one.undecodable is not other.undecodable
        or len(one.copies) != len(other.copies)
    ):
        return False
    return all(a is b or _same(a, b) for a, b in zip(one.copies, other.copies, strict=True))


_PLAIN = attrgetter("snapshot", "geometry", "phase", "data", "parity", "writers", "whole", "restored")


def _same(one: Copy, other: Copy) -> bool:
    return (
        _PLAIN(one) == _PLAIN(other)
        and one.sums is other.sums
        and one.rebuilt is other.rebuilt
        and one.good is other.good
    )


def resumed(empty: State, memory: KeptMemory, alive: Sequence[int]) -> State:
    """Return the first state of an agent that finds this in its memory; `empty` is the one if it found nothing.

    `alive` are the workers of the last agent that may still run.
    """
    copies = [_resumed(empty, copy, alive) for copy in memory.copies]
    here = tuple(copy for copy in copies if copy is not None)
    held = {copy.snapshot for copy in here}
    return replace(
        empty,
        incarnation=max(empty.incarnation, memory.incarnation + 1),
        epoch=memory.epoch,
        decided_epoch=memory.decided_epoch,
        unsettled=memory.epoch if memory.decided_epoch < memory.epoch else 0,
        copies=here,
        undecodable=frozenset(failed for failed in memory.undecodable if failed.snapshot in held),
    )


def _resumed(empty: State, found: KeptCopy, alive: Sequence[int]) -> Copy | None:
    """Return what is left of a copy: None if its buffers are free."""
    copy = Copy(
        found.snapshot, found.geometry, empty.group, found.phase, found.data, found.parity,
        whole=found.whole, restored=found.restored,
    )  # fmt: skip
    if found.phase in (Phase.FILLING, Phase.DRAINING):
        writers = found.writers.intersection(alive)
        return replace(copy, phase=Phase.DRAINING, parity=None, writers=writers) if writers else None
    if found.phase is Phase.DURABLE or not found.good:
        return None
    phase = found.phase if found.whole else Phase.KEPT
    return replace(copy, phase=phase, sums=found.sums, rebuilt=found.rebuilt, good=found.good)
