"""Encode snapshots: send data chunks to the parity holders and accumulate arriving buckets into parity chunks."""

import functools
from collections.abc import Hashable

from keepwarm.ft.agent.outbox import Job, chunk_pieces
from keepwarm.ft.agent.shell import Arrived, Shell
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import SnapshotId, digest


class Encoder:
    """Runs the effects that read and write buffers on the thread pool."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._strands: dict[SnapshotId, set[Hashable]] = {}

    def send_chunk(self, effect: events.SendChunk) -> None:
        shell = self._shell
        link = shell.network.links.get(effect.to)
        if link is None:
            return
        pieces = chunk_pieces(
            effect.snapshot,
            effect.stripe,
            effect.sums,
            effect.start,
            lambda index: shell.memory.data_bucket(effect.buffer, effect.first + index),
        )
        shell.outbox.add(link, Job(effect.snapshot, effect.stripe, pieces), replace=True)

    def verify(self, effect: events.Verify) -> None:
        """Verify a data buffer against its workers' checksums."""
        shell, sums = self._shell, effect.sums
        size = shell.config.bucket_bytes
        data = shell.memory.data[effect.buffer].data[: len(sums) * size]
        strand = ("data", effect.buffer)
        self._strands.setdefault(effect.snapshot, set()).add(strand)

        def read() -> tuple[int, ...]:
            seen = bucket_sums(data, size)
            return tuple(i for i, (a, b) in enumerate(zip(seen, sums, strict=True)) if a != b)

        shell.pool.order(strand, read, lambda bad: shell.dispatch(events.DataVerified(effect.snapshot, bad)))

    def clear(self, effect: events.ClearParity) -> None:
        shell = self._shell
        strand = self._parity_strand(effect.snapshot, effect.buffer, effect.stripe)
        shell.pool.drop(lambda other: other == strand)
        shell.pool.order(strand, lambda: shell.memory.parity_chunk(effect.buffer, effect.stripe).fill(0))

    def accumulate(self, effect: events.Accumulate, arrived: Arrived) -> None:
        """Add an arrived bucket to the parity of its stripe, then free its receive buffer."""
        shell = self._shell
        group, data = shell.state.group, arrived.data
        arrived.wanted = True
        row = shell.codec.row(group.parities(effect.stripe).index(shell.config.slot))
        start = effect.index * shell.config.bucket_bytes
        target = shell.memory.parity_chunk(effect.buffer, effect.stripe)[start : start + len(data)]
        strand = self._parity_strand(effect.snapshot, effect.buffer, effect.stripe)
        shell.pool.order(strand, functools.partial(row.accumulate, target, effect.column, data), None, arrived.done)

    def finish(self, effect: events.FinishParity) -> None:
        """Read back a complete parity chunk and compute its checksum."""
        shell = self._shell
        chunk = shell.memory.parity_chunk(effect.buffer, effect.stripe)
        shell.pool.order(
            self._parity_strand(effect.snapshot, effect.buffer, effect.stripe),
            lambda: digest(bucket_sums(chunk, shell.config.bucket_bytes)),
            lambda value: shell.dispatch(events.ParityVerified(effect.snapshot, effect.stripe, value)),
        )

    def stop(self, snapshot: SnapshotId) -> None:
        """Drop all unfinished work on a snapshot."""
        self._shell.outbox.stop(lambda job: job.snapshot == snapshot)
        gone = self._strands.pop(snapshot, set())
        self._shell.pool.drop(lambda strand: strand in gone)

    def release(self, snapshot: SnapshotId) -> None:
        """Release the buffers of a snapshot."""
        self._strands.pop(snapshot, None)

    def _parity_strand(self, snapshot: SnapshotId, buffer: int, stripe: int) -> Hashable:
        """Return the strand of one parity chunk, which serializes work on that memory across snapshots."""
        strand = ("parity", buffer, stripe)
        self._strands.setdefault(snapshot, set()).add(strand)
        return strand
