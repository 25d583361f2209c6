"""Restore from the agents of the layout before, which hold its state until the present one has committed its own.

The ranks of a node attach to its old agent without a part of their own, and read the pieces that their shards are made
of: from that agent's memory directly, from other nodes' through it. Nothing is written there.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from keepwarm.ft.discovery.config import FormerLayout
from keepwarm.ft.errors import ForeignSnapshot, IncompleteError
from keepwarm.ft.worker.client import AgentClient
from keepwarm.ft.worker.reader import RankPlace, Reader
from keepwarm.ft.worker.snapshotter import Restoration, Shard, piece_of, write_shard

READING = "reads for another layout"
"""Layout by which the ranks attach: no snapshot has it."""


def restore_former(
    client: AgentClient, former: FormerLayout, place: RankPlace, state: Mapping[str, Shard], optional: tuple[str, ...]
) -> Restoration | str:
    """Fill the live shards from what the former layout's agents restore, or return why there is none.

    All sources are located before the first byte is written, and every byte is verified before it is used.

    Args:
        client: connected to the agent `former.slot` as the worker that this rank is on its node; its deadline is that
            of each answer. The caller closes it.
        former: the layout.
        place: of this rank in the present layout.
        state: live shards.
        optional: prefixes of names that may be missing, which then keep their values.

    Raises:
        ForeignSnapshot: the snapshot is of another model or run.
        FtError: agents, peers or bytes were lost.
    """
    attached = client.attach(layout=READING, workers=place.workers, buckets=0)
    for buffer in client.buffers:
        buffer.data.setflags(write=False)
    answer = client.restore(former.epoch)
    if answer.snapshot is None:
        return answer.text
    if answer.snapshot.run != client.run:
        raise ForeignSnapshot(f"snapshot {answer.snapshot} belongs to run {answer.snapshot.run!r}")
    there = replace(place, node=former.slot, nodes=former.slots, bucket_bytes=attached.bucket_bytes)
    source = Reader(client, answer, answer.snapshot, there, client.deadline)
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
    return Restoration(epoch=answer.snapshot.epoch, step=answer.snapshot.step, meta=meta, local=local)
