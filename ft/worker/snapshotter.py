"""Worker's side of a snapshot: copy live shards into the granted buffer while training continues, and back.

A worker's part of a buffer starts with its `Contents` (a map of the part, and the caller's small state), followed by
the pieces. Data-parallel replicas divide identical data among themselves, so each copies and stores only its share.
"""

import contextlib
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import xxhash

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import (
    AgentError,
    BufferBusy,
    DeviceMissedMemory,
    ForeignSnapshot,
    FtError,
    IncompleteError,
    PageLockFailed,
)
from keepwarm.ft.format.contents import ITEM_SIZE, META_BYTES, Contents, Move, Piece, encode_contents, move_bytes
from keepwarm.ft.memory.cpus import unbound_cpus
from keepwarm.ft.memory.shared_memory import SharedBuffer
from keepwarm.ft.protocol.messages import Refused, SnapshotId
from keepwarm.ft.worker.client import AgentClient
from keepwarm.ft.worker.device_copy import DeviceCopy
from keepwarm.ft.worker.reader import Moves, RankPlace, Reader, Stored

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
WHOLE_BELOW = 1 << 16
"""Size in bytes below which replicas do not split a shard but take turns storing it whole."""
_ALIGNMENT = 64
LOCK_STEP = 256 << 20
"""Bytes that are page-locked at once, rounded to whole buckets; meanwhile CUDA serves no other thread."""


class Shard(Protocol):
    """One rank's live part of a global tensor, as returned by `Engine.state()`."""

    @property
    def name(self) -> str: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...
    @property
    def offsets(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def local(self) -> torch.Tensor: ...
    @property
    def replicas(self) -> tuple[int, ...]: ...
    @property
    def flat(self) -> tuple[int, int] | None: ...


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """Data one rank stores and its offsets in the part. A pure function of the state's shapes and the rank."""

    entries: tuple[tuple[Piece, int], ...]
    header_bytes: int
    size: int
    bucket_bytes: int

    @property
    def buckets(self) -> int:
        return self.size // self.bucket_bytes


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """The restored step, which had just been completed, and its small state."""

    epoch: int
    step: int
    meta: bytes
    local: bool
    """Whether all bytes came from this node's own memory."""


@dataclass
class Timings:
    """Timings of the last snapshot on this worker in seconds, and totals."""

    copy: float = 0.0
    blocked: float = 0.0
    total_blocked: float = 0.0
    taken: int = 0
    skipped: int = 0
    bytes: int = 0


def plan_part(state: Mapping[str, Shard], rank: int, bucket_bytes: int, *, meta_bytes: int = META_BYTES) -> PartPlan:
    """Plan which bytes of `state` `rank` stores. `meta_bytes` is the space reserved for the small state."""
    pieces = [piece for shard in state.values() if (piece := share(shard, rank)) is not None]
    unplaced = tuple((piece, 0) for piece in pieces)
    empty = Contents(rank=0, world=0, workers=0, size=0, meta=b"", entries=unplaced)
    header = len(encode_contents(empty)) + 16 * len(pieces) + meta_bytes + 64
    at = header = _up(header, _ALIGNMENT)
    entries = []
    for piece in pieces:
        entries.append((piece, at))
        at = _up(at + piece.bytes, _ALIGNMENT)
    return PartPlan(
        entries=tuple(entries), header_bytes=header, size=_up(max(at, 1), bucket_bytes), bucket_bytes=bucket_bytes
    )


def share(shard: Shard, rank: int) -> Piece | None:
    """Return the piece of a replicated shard that `rank` stores, or None if it stores none of it.

    Depends on the shard alone, because replicas may hold different numbers of other shards, as pipeline stages do.
    """
    dtype = DTYPES[shard.local.dtype]
    start, stop = shard.flat or (0, shard.local.numel())
    flat: tuple[int, int] | None = shard.flat
    replicas = shard.replicas or (rank,)
    if len(replicas) > 1:
        place, size = replicas.index(rank), stop - start
        if size * ITEM_SIZE[dtype] < WHOLE_BELOW:
            turn = xxhash.xxh3_64_intdigest(f"{shard.name} {tuple(shard.offsets)} {flat}".encode())
            if place != turn % len(replicas):
                return None
        else:
            step = _up(-(-size // len(replicas)), _ALIGNMENT)
            flat = start + min(size, place * step), start + min(size, (place + 1) * step)
            if flat[0] == flat[1]:
                return None
    return Piece(
        name=shard.name, global_shape=tuple(shard.global_shape), offsets=tuple(shard.offsets),
        shape=tuple(shard.shape), dtype=dtype, flat=flat,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SnapshotOptions:
    """Options of a worker's snapshots. `deadline` is in seconds, for a buffer and for the agents' answers."""

    busy: Literal["wait", "skip"] = "wait"
    """Behaviour while the previous snapshot is not committed: wait for a buffer, or skip this snapshot."""
    meta_bytes: int = META_BYTES
    """Bytes reserved for the small state."""
    deadline: float = 600.0
    optional: tuple[str, ...] = ()
    """Names with one of these prefixes may be missing from the restored snapshot and then keep their values."""


class Snapshotter:
    """Takes and restores snapshots of the shards of one engine. Not thread-safe; one per process."""

    def __init__(
        self, client: AgentClient, state: Mapping[str, Shard], place: RankPlace, *, layout: str,
        options: SnapshotOptions | None = None,
    ) -> None:  # fmt: skip
        """Attach to the agent with all workers of this node. `layout` is the hash of the job's layout.

        Raise `AgentError` if the agent refuses this worker.
        """
        options = options or SnapshotOptions()
        self.client, self.state, self.place, self.layout = client, dict(state), place, layout
        self._options = options
        bucket_bytes = place.bucket_bytes
        self.plan = plan_part(self.state, place.rank, bucket_bytes, meta_bytes=options.meta_bytes)
        self.timings = Timings(bytes=self.plan.size)
        attached = client.attach(
            layout=layout, workers=place.workers, buckets=self.plan.buckets, deadline=options.deadline
        )
        if attached.bucket_bytes != bucket_bytes:
            raise AgentError(f"the agent has buckets of {attached.bucket_bytes} bytes, this worker of {bucket_bytes}")
        self._first = attached.first * bucket_bytes
        device = next((s.local.device for s in self.state.values() if s.local.device.type != "cpu"), None)
        self._device_copy = None if device is None else DeviceCopy(self.state, self.plan, device)
        self._unlocked: FtError | None = None
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._failed: BaseException | None = None
        self._rotten: FtError | None = None
        self._sealed: SnapshotId | None = None

    # ---- taking snapshots

    def offer(self, step: int, meta: bytes) -> None:
        """Start a snapshot of the state after `step` and return immediately. `join` before the state changes again.

        `meta` is everything else needed for bitwise continuation (random states, ledger, counters), captured by the
        caller now. Raise `ValueError` if it exceeds the planned size.
        """
        self.join()
        if self.client.gone:
            return
        head = self._head(meta)
        if self._device_copy is not None:
            self._device_copy.ready()
        self._cancelled.clear()
        snapshot = SnapshotId(self.client.run, self.client.epoch, step, self.layout)
        self._thread = threading.Thread(target=self._take, args=(snapshot, head), name="snapshot", daemon=True)
        self._thread.start()

    def join(self) -> float:
        """Wait until the running copy is done and the tensors may change. Return the seconds spent waiting.

        With `when_busy: wait` this includes the wait for a buffer. A failing snapshot does not stop training: the error
        is kept in `failure`. After a restore, raise `ChunkCorrupt` if the restored data does not match its checksums.
        """
        blocked = self._wait()
        if self._rotten is not None:
            raise self._rotten
        return blocked

    def _wait(self) -> float:
        if self._thread is None:
            return 0.0
        began = time.perf_counter()
        self._thread.join(self._options.deadline)
        if self._thread.is_alive():
            self._cancelled.set()
            self._thread.join()
        self._thread = None
        blocked = time.perf_counter() - began
        self.timings.blocked = blocked
        self.timings.total_blocked += blocked
        return blocked

    def cancel(self) -> None:
        """Cancel a running copy, as after a failure elsewhere, and the check of restored data."""
        self._cancelled.set()
        self._wait()
        self._rotten = None

    def abandon(self) -> None:
        """Cancel as `cancel` does, without waiting for a buffer. Afterwards the client can only be closed."""
        self.client.interrupt()
        self.cancel()

    @property
    def failure(self) -> BaseException | None:
        """Why the last snapshot was not taken, or None if it was sealed. One that is under way counts when it ends."""
        return self._failed

    @property
    def unlocked(self) -> FtError | None:
        """Why copies from the device pass through buffers of their own, or None if they do not."""
        return self._unlocked

    @property
    def running(self) -> bool:
        """Whether a snapshot is being copied."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def sealed(self) -> SnapshotId | None:
        """The last snapshot sealed by this worker. It may not be committed yet."""
        return self._sealed

    def _head(self, meta: bytes) -> bytes:
        place = self.place
        head = encode_contents(
            Contents(
                rank=place.rank, world=place.world, workers=place.workers, size=self.plan.size, meta=meta,
                entries=self.plan.entries,
            )
        )  # fmt: skip
        if len(head) > self.plan.header_bytes:
            raise ValueError(f"the small state has {len(meta)} bytes, more than the {META_BYTES} that were planned for")
        return head

    def _take(self, snapshot: SnapshotId, head: bytes) -> None:
        """Get a buffer, copy and seal, on the thread. Whatever goes wrong, the agent learns that nothing is coming."""
        granted = False
        try:
            if self._device_copy is not None:
                self._device_copy.enter()
            answer = self.client.open(snapshot, wait=self._options.busy == "wait", deadline=self._options.deadline)
            if isinstance(answer, Refused):
                raise BufferBusy(f"snapshot of step {snapshot.step} was refused: {answer.text}")
            granted = True
            began = time.perf_counter()
            buffer = self.client.buffers[answer.buffer]
            buffer.fault_in()
            self.client.seal(snapshot, self._copy(snapshot, buffer, head))
            self.timings.copy = time.perf_counter() - began
            self.timings.taken += 1
            self._sealed, self._failed = snapshot, None
        except Exception as error:
            self.timings.skipped += 1
            self._failed = error
            if granted:
                with contextlib.suppress(AgentError):
                    self.client.cancel(snapshot)

    def _copy(self, snapshot: SnapshotId, buffer: SharedBuffer, head: bytes) -> tuple[int, ...]:
        """Copy header and pieces bucket by bucket, computing each checksum as soon as its bucket is full."""
        part = buffer.data[self._first : self._first + self.plan.size]
        size = self.plan.bucket_bytes
        sums: list[int] = []

        def filled(upto: int) -> None:
            if self._cancelled.is_set() or self.client.revoked(snapshot):
                raise GivenUp(f"snapshot of step {snapshot.step} was given up")
            while (len(sums) + 1) * size <= upto:
                sums.append(xxhash.xxh3_64_intdigest(part[len(sums) * size : (len(sums) + 1) * size].data))

        part[: len(head)] = np.frombuffer(head, np.uint8)
        if self._device_copy is not None:
            self._copy_from_device(self._device_copy, buffer, part, filled)
        else:
            for piece, at in self.plan.entries:
                source = _bytes_of(self.state[piece.name], piece)
                done = 0
                while done < piece.bytes:
                    # Stop at the end of a bucket, to compute its checksum while it is in cache.
                    stop = min(piece.bytes, _up(at + done + 1, size) - at)
                    np.copyto(part[at + done : at + stop], source[done:stop])
                    done = stop
                    filled(at + done)
        filled(len(part))
        return tuple(sums)

    def _copy_from_device(
        self, device_copy: DeviceCopy, buffer: SharedBuffer, part: Bytes, filled: Callable[[int], None]
    ) -> None:
        try:
            device_copy.copy(part, filled, locked=self._locked(buffer))
        except DeviceMissedMemory as error:
            # The page lock is not what it should be: the next snapshot goes another way.
            self._unlocked = self._unlocked or error
            for each in self.client.buffers:
                each.unlock_pages()
            raise

    def _locked(self, buffer: SharedBuffer) -> bool:
        """Page-lock this rank's part of a buffer, on the first copy into it; return whether it is locked."""
        size = self.plan.bucket_bytes
        step = _up(LOCK_STEP, size) if size % mmap.PAGESIZE == 0 else self.plan.size
        if self._unlocked is None:
            try:
                buffer.lock_pages(self._first, self._first + self.plan.size, step)
            except PageLockFailed as error:
                self._unlocked = error
        return self._unlocked is None

    # ---- restoring snapshots

    def restore(self, epoch: int) -> Restoration | str:
        """Restore epoch `epoch`'s snapshot into the live shards, or return the reason why none is in memory.

        All sources are located before the first byte is written. The agents have verified their memory in this epoch.
        Data copied from this node's memory is verified once more during the first step, and `join` reports the result.
        Raise `ForeignSnapshot` if the snapshot is of another model, and `ChunkCorrupt` if other bytes do not match.
        """
        self.cancel()
        answer = self.client.restore(epoch, deadline=self._options.deadline)
        if answer.snapshot is None:
            return answer.text
        if answer.snapshot.run != self.client.run:
            raise ForeignSnapshot(f"snapshot {answer.snapshot} belongs to run {answer.snapshot.run!r}")
        source = Reader(self.client, answer, answer.snapshot, self.place, self._options.deadline)
        try:
            targets = {name: piece_of(shard) for name, shard in self.state.items()}
            moves, meta, local = source.find(targets, self._options.optional)
        except IncompleteError as error:
            raise ForeignSnapshot(f"snapshot {answer.snapshot} does not fit this model: {error}") from error
        with self._threads() as threads:
            whole, rest = self._sorted(moves, source)
            source.fill(whole, threads)
            source.check(source.spans(rest), threads)
            for name in rest:
                write_shard(self.state[name], rest[name], source)
        self._thread = threading.Thread(target=self._check_after, args=(source, whole), name="check", daemon=True)
        self._thread.start()
        return Restoration(epoch=answer.snapshot.epoch, step=answer.snapshot.step, meta=meta, local=local)

    def _check_after(self, source: Reader, copied: Sequence[tuple[int, Bytes]]) -> None:
        """Verify memory after it was copied: nothing writes to it until `join`, so if it is intact now, it was then."""
        try:
            with self._threads() as threads:
                source.check([(start, start + len(target)) for start, target in copied], threads)
        except FtError as error:
            self._rotten = error
        except Exception as error:
            # What was not verified must not pass for verified.
            self._rotten = FtError(f"restored memory could not be verified: {error!r}")

    def _threads(self) -> ThreadPoolExecutor:
        """Return a thread pool sized to this worker's share of the cores."""
        return ThreadPoolExecutor(max(1, len(unbound_cpus()) // self.place.workers), "restore")

    def _sorted(self, moves: Moves, source: Reader) -> tuple[list[tuple[int, Bytes]], Moves]:
        """Split the moves into (start, target) copies from this node's buffer straight into shards, and the rest."""
        whole: list[tuple[int, Bytes]] = []
        rest: dict[str, Sequence[tuple[Move, Stored]]] = {}
        for name, each in moves.items():
            runs = [move.run for move, _ in each]
            if source.local(each) and _direct(self.state[name]) and None not in runs:
                target = self.state[name].local.detach().reshape(-1).view(torch.uint8).numpy()
                whole += [
                    (stored.start + move.span[0], target[run[0] : run[1]])
                    for (move, stored), run in zip(each, runs, strict=True)
                    if run is not None
                ]
            else:
                rest[name] = each
        return whole, rest


class GivenUp(FtError):
    """A copy was cancelled partway."""


def write_shard(shard: Shard, moves: Iterable[tuple[Move, Stored]], source: Reader) -> None:
    """Fill one live shard in place."""
    local = shard.local.detach()
    direct = _direct(shard)
    room = local if direct else torch.empty(local.shape, dtype=local.dtype)
    target = room.reshape(-1).view(torch.uint8).numpy()
    for whole, stored in moves:
        for move in source.in_turn(whole, stored):
            start, stop = move.span
            move_bytes(move, source.bytes(stored.owner, stored.start + start, stored.start + stop), target)
    if not direct:
        with torch.no_grad():
            local.copy_(room)


def _direct(shard: Shard) -> bool:
    """Return whether bytes can be copied straight into the shard's memory."""
    return shard.local.device.type == "cpu" and shard.local.is_contiguous()


def piece_of(shard: Shard) -> Piece:
    """Return the shard's description without its memory."""
    return Piece(
        name=shard.name, global_shape=tuple(shard.global_shape), offsets=tuple(shard.offsets),
        shape=tuple(shard.shape), dtype=DTYPES[shard.local.dtype], flat=shard.flat,
    )  # fmt: skip


def _bytes_of(shard: Shard, piece: Piece) -> Bytes:
    """Return the bytes of a piece in a live CPU shard, copying only if the tensor is not contiguous."""
    flat = shard.local.detach().reshape(-1).view(torch.uint8).numpy()
    if piece.flat is None:
        return flat
    size = ITEM_SIZE[piece.dtype]
    first = piece.flat[0] - (shard.flat[0] if shard.flat else 0)
    return flat[first * size : (first + piece.elements) * size]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
