"""Restore from the agents of the layout before, which hold its state until the present one has committed its own.

The ranks of a node attach to its old agent without a part of their own, and read the pieces that their shards are made
of: from that agent's memory directly, from other nodes' through it. A node that has joined since has no old agent: its
ranks hear from the others what is restored, connect to the agent of one of them, and read everything through it.
Nothing is written there.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import msgspec

from keepwarm.ft.discovery.config import FormerLayout
from keepwarm.ft.errors import AgentError, ForeignSnapshot, IncompleteError
from keepwarm.ft.protocol.messages import Address, Restored, SnapshotId
from keepwarm.ft.worker.client import AgentClient
from keepwarm.ft.worker.reader import ELSEWHERE, RankPlace, Reader
from keepwarm.ft.worker.snapshotter import Restoration, Shard, piece_of, write_shard

READING = "reads for another layout"
"""Layout by which the ranks attach: no snapshot has it."""
FOUND_BYTES = 768
"""Room for what a rank tells the others of its old agent: names in it have at most 128 characters each."""


class Found(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the old agents restore, as one of them says, where it listens, and the sizes of its memory."""

    address: Address
    epoch: int
    snapshot: SnapshotId | None
    decoded: int
    bucket_bytes: int
    buffer_bytes: int


@dataclass(frozen=True, kw_only=True)
class FormerMemory:
    """What a rank reads: the answer of the agents of the former layout, through one of them."""

    client: AgentClient
    """Connected to the agent `layout.slot`, or to that of another node. The caller closes it."""
    layout: FormerLayout
    answer: Restored
    bucket_bytes: int
    buffer_bytes: int


def attach(client: AgentClient, layout: FormerLayout, workers: int) -> tuple[FormerMemory, Found]:
    """Attach this rank to its node's old agent; return its memory, and what ranks elsewhere need to know of it.

    Args:
        client: connected to the agent `layout.slot` as the worker that this rank is on its node; its deadline is that
            of each answer.
        layout: the former one.
        workers: ranks of this node.

    Raises:
        FtError: agents were lost.
    """
    attached = client.attach(layout=READING, workers=workers, buckets=0)
    for buffer in client.buffers:
        buffer.data.setflags(write=False)
    answer = client.restore(layout.epoch)
    found = Found(
        address=attached.address, epoch=answer.epoch, snapshot=answer.snapshot, decoded=answer.decoded,
        bucket_bytes=attached.bucket_bytes, buffer_bytes=attached.buffer_bytes,
    )  # fmt: skip
    memory = FormerMemory(
        client=client, layout=layout, answer=answer, bucket_bytes=attached.bucket_bytes,
        buffer_bytes=attached.buffer_bytes,
    )  # fmt: skip
    return memory, found


def chosen(found: Mapping[int, Found], node: int) -> Found:
    """Return which old agent the ranks of a `node` without one read from: nodes take them in turn. Pure.

    Raise `AgentError` if there is none.
    """
    if not found:
        raise AgentError("no node has an agent of the layout before")
    return found[sorted(found)[node % len(found)]]


def elsewhere(client: AgentClient, layout: FormerLayout, found: Found) -> FormerMemory:
    """Return the memory that a rank reads through the agent of another node, to which `client` is connected."""
    answer = Restored(
        epoch=found.epoch, snapshot=found.snapshot, decoded=found.decoded,
        text="" if found.snapshot is not None else "the agents of the layout before restore nothing",
    )  # fmt: skip
    return FormerMemory(
        client=client, layout=layout, answer=answer, bucket_bytes=found.bucket_bytes, buffer_bytes=found.buffer_bytes
    )


def restore_former(
    memory: FormerMemory, place: RankPlace, state: Mapping[str, Shard], optional: tuple[str, ...]
) -> tuple[Restoration | str, int]:
    """Fill the live shards from what the former layout's agents restore, or return why there is none.

    Also return the bytes of chunks that were decoded for it on all nodes.

    All sources are located before the first byte is written, and every byte is verified before it is used.

    Args:
        memory: of the former layout.
        place: of this rank in the present layout.
        state: live shards.
        optional: prefixes of names that may be missing, which then keep their values.

    Raises:
        ForeignSnapshot: the snapshot is of another model or run.
        FtError: agents, peers or bytes were lost.
    """
    client, answer, former = memory.client, memory.answer, memory.layout
    if answer.snapshot is None:
        return answer.text, 0
    if answer.snapshot.run != client.run:
        raise ForeignSnapshot(f"snapshot {answer.snapshot} belongs to run {answer.snapshot.run!r}")
    there = replace(
        place, node=ELSEWHERE if former.slot is None else former.slot, nodes=former.slots,
        bucket_bytes=memory.bucket_bytes,
    )  # fmt: skip
    source = Reader(client, answer, answer.snapshot, there, client.deadline, memory.buffer_bytes)
    try:
        targets = {name: piece_of(shard) for name, shard in state.items()}
        moves, meta, local = source.find(targets, optional)
    except IncompleteError as error:
        raise ForeignSnapshot(f"snapshot {answer.snapshot} does not fit this model: {error}") from error
    share = max(1, len(os.sched_getaffinity(0)) // place.workers)
    with ThreadPoolExecutor(share, "restore") as threads:
        source.check(source.spans(moves), threads)
    for name, each in moves.items():
        write_shard(state[name], each, source)
    restored = Restoration(epoch=answer.snapshot.epoch, step=answer.snapshot.step, meta=meta, local=local)
    return restored, answer.decoded * memory.bucket_bytes


def encoded(found: Found) -> bytes:
    """Return what a rank tells the others, in at most `FOUND_BYTES`."""
    return msgspec.msgpack.encode(found)


def decoded(rows: Sequence[bytes]) -> dict[int, Found]:
    """Return what the ranks of each node have told, without those that told nothing."""
    return {node: msgspec.msgpack.decode(row, type=Found) for node, row in enumerate(rows) if row}
