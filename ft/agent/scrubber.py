"""Scrub memory at rest continuously, to find corrupt chunks before they are needed."""

import functools
from collections.abc import Callable

import xxhash

from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import ChunkRecord, SnapshotId, digest
from keepwarm.ft.protocol.state import Copy

READ_AT_ONCE = 32 << 20
"""Bytes of a chunk that one thread reads at a time while other threads read the rest."""


class Scrub:
    """Scrubs one chunk at a time on a pool thread. A pass starts every `config.scrub` seconds."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._next = shell.clock() + (shell.config.scrub or 0.0)
        self._queue: list[tuple[SnapshotId, ChunkRecord]] = []
        self._running = False
        self.checked = self.damaged = 0

    def tick(self, now: float) -> None:
        if self._shell.config.scrub is None or self._running:
            return
        if not self._queue and now >= self._next:
            self._next = now + self._shell.config.scrub
            self._queue = [
                (copy.snapshot, record)
                for copy in self._shell.state.copies
                if copy.committed
                for record in copy.good.values()
            ]
        while self._queue and not self._running:
            snapshot, record = self._queue.pop()
            copy = self._shell.state.copy(snapshot)
            if copy is not None and copy.committed and record in copy.good.values():
                self._check(copy, record)

    def _check(self, copy: Copy, record: ChunkRecord) -> None:
        shell = self._shell
        buckets = shell.memory.buckets(shell.memory.chunk(copy.data, copy.parity, record.stripe))[: record.count]
        self._running = True

        def tell(intact: bool) -> None:
            self._running = False
            now = shell.state.copy(copy.snapshot)
            if now is None or (now.data, now.parity) != (copy.data, copy.parity):
                return  # the buffer may already hold another snapshot
            self.checked += 1
            self.damaged += not intact
            if not intact:
                shell.journal.write("warning", "a chunk has rotted", snapshot=copy.snapshot, stripe=record.stripe)
            shell.dispatch(events.Scrubbed(copy.snapshot, record.stripe, intact))

        shell.pool.run(functools.partial(_same, buckets, record), tell)


def verify_all(shell: Shell, then: Callable[[], None]) -> None:
    """Verify every good chunk of every copy that recovery may choose, and report corrupt ones before calling `then`."""
    waiting = 0

    def told(snapshot: SnapshotId, record: ChunkRecord, intact: bool) -> None:
        nonlocal waiting
        waiting -= 1
        if not intact:
            shell.journal.write("warning", "a chunk has rotted", snapshot=snapshot, stripe=record.stripe)
            shell.dispatch(events.Scrubbed(snapshot, record.stripe, False))
        if not waiting:
            then()

    for copy in shell.state.copies:
        if not copy.candidate:
            continue
        for record in copy.good.values():
            chunk = shell.memory.chunk(copy.data, copy.parity, record.stripe)
            waiting += 1
            _verify(shell, chunk, record, functools.partial(told, copy.snapshot, record))
    if not waiting:
        shell.pool.run(lambda: None, lambda _: then())


def _verify(shell: Shell, chunk: Bytes, record: ChunkRecord, then: Callable[[bool], None]) -> None:
    """Verify one chunk on all pool threads, since at a start every agent waits for the result."""
    buckets = shell.memory.buckets(chunk)[: record.count]
    share = max(1, READ_AT_ONCE // shell.config.bucket_bytes)
    parts = [buckets[at : at + share] for at in range(0, len(buckets), share)] or [[]]
    sums: dict[int, list[int]] = {}

    def summed(part: int, found: list[int]) -> None:
        sums[part] = found
        if len(sums) == len(parts):
            then(digest(each for part in range(len(parts)) for each in sums[part]) == record.digest)

    for number, part in enumerate(parts):
        shell.pool.run(functools.partial(_sums, part), functools.partial(summed, number))


def _same(buckets: list[Bytes], record: ChunkRecord) -> bool:
    return digest(_sums(buckets)) == record.digest


def _sums(buckets: list[Bytes]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(bucket.data) for bucket in buckets]
