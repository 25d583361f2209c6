"""Copy live shards from a device into snapshot memory while training continues, on a stream of its own.

The last bytes that the device writes into a bucket are its canary. Before, the CPU writes their complement there; once
the copy has ended, memory must hold what the device sent elsewhere ahead of all copies. So a bucket that the device did
not reach, as after memory was mapped again under a page lock, is found whatever it contained.
"""

import collections
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import DeviceMissedMemory
from keepwarm.ft.format.contents import ITEM_SIZE, Piece

AHEAD = 4
"""Buckets whose copies are under way at once; without a page lock also the number of buffers that they pass through."""
CANARY_BYTES = 64


class Live(Protocol):
    """What a copy needs of a shard."""

    @property
    def local(self) -> torch.Tensor: ...
    @property
    def flat(self) -> tuple[int, int] | None: ...


class Plan(Protocol):
    """What a copy needs of a part: its pieces with their offsets, and its buckets."""

    @property
    def entries(self) -> Sequence[tuple[Piece, int]]: ...
    @property
    def bucket_bytes(self) -> int: ...
    @property
    def buckets(self) -> int: ...


@dataclass(frozen=True)
class _Span:
    """Bytes of a piece within one bucket."""

    piece: Piece
    first: int
    """Of the piece."""
    at: int
    """Of the part."""
    length: int
    on_device: bool


class DeviceCopy:
    """Copies one rank's part. `ready` belongs to training's thread, the rest to that of the snapshots."""

    def __init__(self, state: Mapping[str, Live], plan: Plan, device: torch.device) -> None:
        self._state, self._plan, self._device = state, plan, device
        self._stream = torch.Stream(device)
        self._ready = torch.Event(device)
        self._spans = _by_bucket(plan, {name for name, shard in state.items() if shard.local.device.type != "cpu"})
        self._flat: tuple[str, torch.Tensor] | None = None
        self._buffers: list[torch.Tensor] = []

    def ready(self) -> None:
        """Let the next copy wait for what training has asked of the device so far, but for nothing later."""
        self._ready = torch.Event(self._device)
        self._ready.record(torch.accelerator.current_stream(self._device))

    def enter(self) -> None:
        """Make the device that of the calling thread. A new thread has the first one, which other ranks use."""
        torch.accelerator.set_device_index(self._device)

    def copy(self, part: Bytes, filled: Callable[[int], None], *, locked: bool) -> None:
        """Copy all pieces, and call `filled` with the bytes that are complete after each bucket; it may raise.

        Returns or raises only when the device writes to `part` no more. `locked`: the device may write to it directly.

        Raises:
            DeviceMissedMemory: what a copy wrote did not arrive in `part`.
        """
        with self._stream:
            try:
                self._stream.wait_event(self._ready)
                self._copy(part, filled, self._canaries(), locked)
            finally:
                self._flat = None
                self._stream.synchronize()

    def _copy(self, part: Bytes, filled: Callable[[int], None], canaries: Bytes, locked: bool) -> None:
        size = self._plan.bucket_bytes
        rooms = [torch.from_numpy(part)] if locked else self._bounce_buffers()
        pending: collections.deque[tuple[int, Bytes, torch.Event]] = collections.deque()
        for bucket in range(len(self._spans)):
            if len(pending) == AHEAD:
                filled(self._land(part, *pending.popleft(), canaries))
            room = rooms[0][bucket * size : (bucket + 1) * size] if locked else rooms[bucket % AHEAD]
            pending.append((bucket, room.numpy(), self._send(bucket, room, canaries, part)))
        while pending:
            filled(self._land(part, *pending.popleft(), canaries))

    def _send(self, bucket: int, room: torch.Tensor, canaries: Bytes, part: Bytes) -> torch.Event:
        """Ask the device for the pieces of a bucket, and return the event that ends them; copy those of the CPU."""
        start = bucket * self._plan.bucket_bytes
        for span in self._last(bucket):
            low, high = _canary(span)
            np.invert(canaries[bucket, : high - low], out=room.numpy()[low - start : high - start])
        for span in self._spans[bucket]:
            source = self._bytes(span.piece).narrow(0, span.first, span.length)
            if span.on_device:
                room[span.at - start : span.at - start + span.length].copy_(source, non_blocking=True)
            else:
                np.copyto(part[span.at : span.at + span.length], source.numpy())
        event = torch.Event(self._device)
        event.record(self._stream)
        return event

    def _land(self, part: Bytes, bucket: int, room: Bytes, event: torch.Event, canaries: Bytes) -> int:
        """Wait for a bucket's copies, compare its canary, and return the bytes of the part up to its end."""
        event.synchronize()
        start = bucket * self._plan.bucket_bytes
        for span in self._spans[bucket]:
            target = part[span.at : span.at + span.length]
            source = room[span.at - start : span.at - start + span.length]
            if span.on_device and source.ctypes.data != target.ctypes.data:
                np.copyto(target, source)
        for span in self._last(bucket):
            low, high = _canary(span)
            if not np.array_equal(part[low:high], canaries[bucket, : high - low]):
                raise DeviceMissedMemory(
                    f"{self._device}: the copy of {span.piece.name} ended, and bucket {bucket} of this rank's "
                    "snapshot memory does not hold it"
                )
        return start + self._plan.bucket_bytes

    def _canaries(self) -> Bytes:
        """Return the last bytes that each bucket is to hold, which reach the host in other memory."""
        room = torch.zeros(len(self._spans), CANARY_BYTES, dtype=torch.uint8, pin_memory=True)
        for bucket in range(len(self._spans)):
            for span in self._last(bucket):
                low, high = _canary(span)
                source = self._bytes(span.piece).narrow(0, span.first + span.length - (high - low), high - low)
                room[bucket, : high - low].copy_(source, non_blocking=True)
        self._stream.synchronize()
        found: Bytes = room.numpy()
        return found

    def _bounce_buffers(self) -> list[torch.Tensor]:
        if not self._buffers:
            size = self._plan.bucket_bytes
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(AHEAD)]
        return self._buffers

    def _last(self, bucket: int) -> Sequence[_Span]:
        """Return the last span that the device copies into a bucket, if there is any."""
        return [span for span in self._spans[bucket] if span.on_device][-1:]

    def _bytes(self, piece: Piece) -> torch.Tensor:
        """Return a piece as bytes. The last one is kept: one that is not contiguous has to be copied on the device."""
        if self._flat is None or self._flat[0] != piece.name:
            shard = self._state[piece.name]
            whole = shard.local.detach().reshape(-1).view(torch.uint8)
            if piece.flat is not None:
                first = piece.flat[0] - (shard.flat[0] if shard.flat else 0)
                whole = whole.narrow(0, first * ITEM_SIZE[piece.dtype], piece.bytes)
            self._flat = piece.name, whole
        return self._flat[1]


def _canary(span: _Span) -> tuple[int, int]:
    """Return the range in the part of the last bytes of a span."""
    stop = span.at + span.length
    return stop - min(CANARY_BYTES, span.length), stop


def _by_bucket(plan: Plan, on_device: Set[str]) -> list[list[_Span]]:
    """Return the spans of every bucket of a part. Pieces without bytes have none."""
    size = plan.bucket_bytes
    found: list[list[_Span]] = [[] for _ in range(plan.buckets)]
    for piece, at in plan.entries:
        done = 0
        while done < piece.bytes:
            bucket = (at + done) // size
            length = min(piece.bytes - done, (bucket + 1) * size - at - done)
            found[bucket].append(_Span(piece, done, at + done, length, piece.name in on_device))
            done += length
    return found
