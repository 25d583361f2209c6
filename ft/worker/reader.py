"""Read the chosen snapshot for one rank: its own node's buffer directly, others through the agent. Torch-free."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import ChunkCorrupt, IncompleteError
from keepwarm.ft.format.contents import (  # fmt: skip
    HEAD_BYTES,
    Contents,
    Move,
    Piece,
    contents_length,
    decode_contents,
    plan,
    split,
)
from keepwarm.ft.memory.buffers import READ_CACHE
from keepwarm.ft.memory.shared_memory import SharedBuffer
from keepwarm.ft.protocol.messages import Restored, SnapshotId
from keepwarm.ft.worker.client import AgentClient

T = TypeVar("T")
ELSEWHERE = -1
"""Node of a rank that has no agent of the layout it reads, and no buffers of it."""
SPAN = 2
"""Buckets of which as many bytes are read at once from another node. They lie in one bucket more if they begin inside
one."""


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Position of a rank: one of `world` ranks, on node `node` of `nodes`, each of which has `workers` ranks.

    `node` is the slot of the node's agent, or `ELSEWHERE`. `bucket_bytes` must equal that of the agents.
    """

    rank: int
    world: int
    workers: int
    node: int
    nodes: int
    bucket_bytes: int


@dataclass(frozen=True)
class Stored:
    """A piece in a node's data buffer."""

    piece: Piece
    owner: int
    start: int


Moves = Mapping[str, Sequence[tuple[Move, Stored]]]
"""Moves that fill each of a rank's shards, by name."""


class Reader:
    """Finds the data that fills a rank's shards and returns its bytes, verified against their checksums."""

    def __init__(
        self, client: AgentClient, restored: Restored, snapshot: SnapshotId, place: RankPlace, deadline: float,
        buffer_bytes: int = 0,
    ) -> None:  # fmt: skip
        """Read `snapshot`, the one named by `restored`.

        `deadline` is in seconds, per answer from another node; `buffer_bytes` the size of a node's data, which a rank
        `ELSEWHERE` does not see.
        """
        self._client, self._snapshot, self._epoch, self._sums = client, snapshot, restored.epoch, restored.sums
        self._place, self._node, self._size, self._deadline = place, place.node, place.bucket_bytes, deadline
        self._local = None if place.node == ELSEWHERE else client.buffers[restored.buffer]
        self._buffer_bytes = buffer_bytes if self._local is None else self._local.size
        self._checked: set[int] = set()
        self._cache: dict[tuple[int, int, int], Bytes] = {}

    def find(self, targets: Mapping[str, Piece], optional: tuple[str, ...]) -> tuple[Moves, bytes, bool]:
        """Return moves for every shard, this rank's small state, and whether all of it is local.

        If the layout differs, the small state is that of rank 0. Names that begin with one of `optional` may be
        missing. Raise `IncompleteError` if any other name is.
        """
        own = [] if self._node == ELSEWHERE else self._parts(self._node)
        meta = {contents.rank: contents.meta for contents, _ in own}
        same = all(contents.world == self._place.world for contents, _ in own)
        try:
            if not same or self._place.rank not in meta:
                raise IncompleteError("not all is here")
            return _moves(own, targets, optional), meta[self._place.rank], True
        except IncompleteError:
            found = [(self._node, own)]
            found += [(owner, self._parts(owner)) for owner in range(self._place.nodes) if owner != self._node]
        everything = [(contents, stored) for _, parts in found for contents, stored in parts]
        meta = {contents.rank: contents.meta for contents, _ in everything}
        worlds = {contents.world for contents, _ in everything}
        own_meta = meta.get(self._place.rank) if worlds == {self._place.world} else None
        return _moves(everything, targets, optional), own_meta or meta[min(meta)], False

    def local(self, moves: Iterable[tuple[Move, Stored]]) -> bool:
        """Return whether all bytes are on this node."""
        return all(stored.owner == self._node for _, stored in moves)

    def spans(self, moves: Moves) -> list[tuple[int, int]]:
        """Return the byte ranges of this node's buffer that the moves read."""
        return [
            (stored.start + move.span[0], stored.start + move.span[1])
            for per_shard in moves.values()
            for move, stored in per_shard
            if stored.owner == self._node
        ]

    def check(self, spans: Iterable[tuple[int, int]], threads: Executor) -> None:
        """Verify this node's buckets that overlap the spans, in parallel. Raise `ChunkCorrupt` on a mismatch."""
        buckets = {index for start, stop in spans for index in self._buckets(start, stop)}
        run_all(threads, self._check, sorted(buckets - self._checked))
        self._checked |= buckets

    def fill(self, copies: Sequence[tuple[int, Bytes]], threads: Executor) -> None:
        """Copy this node's bytes from each start into its target, in parallel and without verification."""
        buffer = self._buffer
        parts = [
            (start + at, target[at : at + self._size])
            for start, target in copies
            for at in range(0, len(target), self._size)
        ]

        def fill(part: tuple[int, Bytes]) -> None:
            start, target = part
            stop = start + len(target)
            buffer.fault_in_to_read(start, stop)
            np.copyto(target, buffer.data[start:stop])

        run_all(threads, fill, parts)

    def bytes(self, owner: int, start: int, stop: int) -> Bytes:
        """Return verified bytes of a node's data buffer. Only one thread at a time may read from other nodes."""
        buckets = self._buckets(start, stop)
        if owner == self._node:
            for index in buckets:
                if index not in self._checked:
                    self._check(index)
                    self._checked.add(index)
            return self._buffer.data[start:stop]
        first, last = buckets.start, buckets.stop
        for (where, low, high), data in self._cache.items():
            if where == owner and low <= first and last <= high:
                return data[start - low * self._size : stop - low * self._size]
        self._make_room(last - first)
        data = self._client.read(
            epoch=self._epoch, snapshot=self._snapshot, owner=owner, first=first, count=last - first,
            deadline=self._deadline,
        )  # fmt: skip
        self._cache[owner, first, last] = data
        return data[start - first * self._size : stop - first * self._size]

    def in_turn(self, move: Move, stored: Stored) -> Iterable[Move]:
        """Return moves that do the same and read little at once, where that comes from another node."""
        return (move,) if stored.owner == self._node else split(move, SPAN * self._size)

    @property
    def _buffer(self) -> SharedBuffer:
        assert self._local is not None
        return self._local

    def _make_room(self, buckets: int) -> None:
        """Drop the oldest answers of other nodes, so that one more leaves at most `READ_CACHE` buckets here.

        Neighbouring tensors share buckets, so the newest ones are kept.
        """
        while self._cache and sum(last - first for _, first, last in self._cache) + buckets > READ_CACHE:
            self._cache.pop(next(iter(self._cache)))

    def _buckets(self, start: int, stop: int) -> range:
        return range(start // self._size, -(-stop // self._size))

    def _check(self, index: int) -> None:
        start = index * self._size
        self._buffer.fault_in_to_read(start, start + self._size)
        if xxhash.xxh3_64_intdigest(self._buffer.data[start : start + self._size].data) != self._sums[index]:
            raise ChunkCorrupt(
                f"snapshot {self._snapshot} on node {self._node}: bucket {index} does not match its checksum"
            )

    def _parts(self, owner: int) -> list[tuple[Contents, list[Stored]]]:
        """Return the contents of all workers' parts on a node."""
        found: list[tuple[Contents, list[Stored]]] = []
        at, count = 0, 1
        while len(found) < count:
            length = contents_length(self.bytes(owner, at, at + HEAD_BYTES))
            if at + length > self._buffer_bytes:
                raise IncompleteError(f"a part on node {owner} is said to begin with {length} bytes, there are fewer")
            contents = decode_contents(self.bytes(owner, at, at + length))
            found.append((contents, [Stored(piece, owner, at + start) for piece, start in contents.entries]))
            at += contents.size
            count = contents.workers
            if len(found) < count and at + HEAD_BYTES > self._buffer_bytes:
                raise IncompleteError(f"node {owner} is said to hold {count} parts, it has room for {len(found)}")
        return found


def run_all(threads: Executor, function: Callable[[T], None], items: Sequence[T]) -> None:
    """Call a function for all items, giving each thread a few long runs of neighbours. Raise the first exception."""
    share = max(1, math.ceil(len(items) / 16))
    runs = [items[at : at + share] for at in range(0, len(items), share)]

    def run(part: Sequence[T]) -> None:
        for item in part:
            function(item)

    list(threads.map(run, runs))


def _moves(
    parts: Sequence[tuple[Contents, list[Stored]]], targets: Mapping[str, Piece], optional: tuple[str, ...]
) -> Moves:
    by_name: dict[str, list[Stored]] = {}
    for _, stored in parts:
        for each in stored:
            by_name.setdefault(each.piece.name, []).append(each)
    moves = {}
    for name, target in targets.items():
        sources = by_name.get(name, [])
        if not sources and optional and name.startswith(optional):
            continue
        if not sources and target.elements:
            raise IncompleteError(f"{name} is not in it")
        moves[name] = [(move, sources[move.source]) for move in plan(target, [each.piece for each in sources])]
    return moves
