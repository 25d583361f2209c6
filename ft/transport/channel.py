"""Framed messages over one non-blocking socket, without extra copies.

A frame is a big-endian u32 length, that many bytes of msgpack and, once the channel is authenticated, their MAC.
`Bucket` and `Part` are followed by `size` bytes of payload, received straight into their destination, and by the MAC of
the payload where payloads have one. A frame of length 0 is a keep-alive.
"""

import array
import collections
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import msgspec

from keepwarm.ft.errors import FrameError, PeerLost, TransportError
from keepwarm.ft.protocol.messages import MESSAGE_LIMIT, Wire, encode
from keepwarm.ft.transport.bandwidth import TURN
from keepwarm.ft.transport.session import TAG_BYTES, Direction, Payload, SessionKeys

_LENGTH = struct.Struct(">I")
_FIRST_BUFFER = 1 << 10
"""Bytes of the receive buffer until the other side has identified itself."""
_BUFFER = 64 << 10
_DESCRIPTORS = 8
_SCRATCH = memoryview(bytearray(_BUFFER))

Decoder: TypeAlias = Callable[[memoryview], Wire]


class Channel:
    """Frames over one stream socket, which it owns. Reads and writes as far as the socket allows and never blocks."""

    def __init__(self, sock: socket.socket, decode: Decoder, payload_limit: int) -> None:
        sock.setblocking(False)
        self.socket, self.decode, self.payload_limit = sock, decode, payload_limit
        self.message_limit = MESSAGE_LIMIT
        self.sent = self.received = 0
        self._in = bytearray(_FIRST_BUFFER)
        self._have = self._used = 0
        self._message: Wire | None = None
        self._target: memoryview | None = None
        self._left = 0
        self._sending: Direction | None = None
        self._receiving: Direction | None = None
        self._payload: Payload | None = None
        """MAC of the payload that is being received."""
        self._out: collections.deque[tuple[memoryview, Callable[[], None] | None]] = collections.deque()
        self._descriptors: list[int] = []
        self.pending = 0
        """Bytes queued but not yet passed to the kernel."""
        self.descriptors: list[int] = []
        """Descriptors received over a Unix socket. Ownership passes to the taker; the rest are closed with the channel.
        """

    def authenticate(self, keys: SessionKeys, *, payloads: bool) -> None:
        """Send and expect MACs from the next frame on, in both directions; with `payloads`, for payloads too."""
        self._sending = Direction(keys.sending, payloads=payloads)
        self._receiving = Direction(keys.receiving, payloads=payloads)

    def trust(self, message_limit: int, payload_limit: int) -> None:
        """Accept whole messages and payloads: the other side has identified itself."""
        self.message_limit, self.payload_limit = message_limit, payload_limit
        self._in.extend(bytes(max(0, _BUFFER - len(self._in))))

    def send(
        self,
        message: Wire | None,
        payload: memoryview | None = None,
        done: Callable[[], None] | None = None,
        descriptors: Iterable[int] = (),
    ) -> None:
        """Queue a frame (None: an empty one). `payload` must not change until `done` is called.

        `descriptors` are sent with the frame over a Unix socket and must stay open until it has been written.
        """
        body = encode(message) if message is not None else b""
        frame = _LENGTH.pack(len(body)) + body
        sending = self._sending
        tag = sending.tag(frame) if sending is not None else b""
        self._descriptors.extend(descriptors)
        self._queue(memoryview(frame + tag), done if payload is None else None)
        if payload is None:
            return
        data = payload.cast("B")
        if sending is None or not sending.payloads:
            self._queue(data, done)
            return
        mac = sending.payload()
        mac.update(data)
        self._queue(data, None)
        self._queue(memoryview(mac.tag()), done)

    def _queue(self, view: memoryview, done: Callable[[], None] | None) -> None:
        self._out.append((view, done))
        self.pending += view.nbytes

    def write(self, budget: int = TURN) -> int:
        """Pass at most `budget` bytes to the kernel. Return how many. Raise `PeerLost` if the other side left."""
        total = 0
        while self._out and total < budget:
            views, size = [], 0
            for view, _ in self._out:
                views.append(view[: budget - total - size])
                size += views[-1].nbytes
                if len(views) == 16 or total + size >= budget:
                    break
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._descriptors))]
                if self._descriptors
                else []
            )
            try:
                count = self.socket.sendmsg(views, ancillary)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                raise PeerLost(f"connection lost while sending: {error.strerror}") from error
            self._descriptors.clear()
            total += count
            self._sent(count)
            if count < size:
                break
        self.sent += total
        return total

    def _sent(self, count: int) -> None:
        self.pending -= count
        while count or (self._out and not self._out[0][0].nbytes):
            view, done = self._out.popleft()
            if count < view.nbytes:
                self._out.appendleft((view[count:], done))
                return
            count -= view.nbytes
            if done is not None:
                done()

    def read(self, target: Callable[[Wire, int], memoryview | None]) -> Iterator[tuple[Wire | None, memoryview | None]]:
        """Yield complete messages with their payloads, and (None, None) for an empty frame.

        `target(message, size)` returns memory of exactly `size` bytes for a payload, or None to drop it. Raise
        `FrameError` for an invalid frame and `PeerLost` if the other side has closed.
        """
        budget = TURN
        yield from self._frames(target)  # left over from a reader that stopped early
        while budget > 0:
            try:
                count = self._receive()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise PeerLost(f"connection lost while receiving: {error.strerror}") from error
            if count == 0:
                middle = self._message is not None or self._have > self._used
                raise PeerLost("closed by the other side" + (" in the middle of a frame" if middle else ""))
            self.received += count
            budget -= count
            yield from self._frames(target)

    def _receive(self) -> int:
        if self._left:
            into = self._target[-self._left :] if self._target is not None else _SCRATCH[: self._left]
            count = self.socket.recv_into(into)
            self._left -= count
            if self._payload is not None:
                self._payload.update(into[:count])
            return count
        if self._used:
            self._in[: self._have - self._used] = self._in[self._used : self._have]
            self._have, self._used = self._have - self._used, 0
        with memoryview(self._in) as whole, whole[self._have :] as room:
            if self.socket.family == socket.AF_UNIX:
                count, descriptors = _with_descriptors(self.socket, room)
                self.descriptors.extend(descriptors)
                if len(self.descriptors) > _DESCRIPTORS:
                    raise FrameError(f"more than {_DESCRIPTORS} descriptors arrived")
            else:
                count = self.socket.recv_into(room)
        self._have += count
        return count

    def _frames(
        self, target: Callable[[Wire, int], memoryview | None]
    ) -> Iterator[tuple[Wire | None, memoryview | None]]:
        while True:
            if self._message is not None:
                if self._left or not self._payload_checked():
                    return
                message, payload = self._message, self._target
                self._message = self._target = None
                yield message, payload
            body = self._frame()
            if body is None:
                return
            if not body:
                yield None, None
                continue
            message = self._decoded(body)
            size = getattr(message, "size", None)
            if size is None:
                yield message, None
            else:
                self._expect(message, size, target)

    def _frame(self) -> bytes | None:
        """Return the body of the next frame, whose MAC is right. None if it is not all here yet."""
        have = self._have - self._used
        if have < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._in, self._used)
        if length > self.message_limit:
            raise FrameError(f"frame of {length} bytes is over the limit of {self.message_limit}")
        size = _LENGTH.size + length
        whole = size + (TAG_BYTES if self._receiving is not None else 0)
        if have < whole:
            missing = self._used + whole - len(self._in)
            if missing > 0:
                self._in.extend(bytes(missing))
            return None
        frame = bytes(self._in[self._used : self._used + size])
        if self._receiving is not None:
            self._receiving.check(frame, bytes(self._in[self._used + size : self._used + whole]))
        self._used += whole
        return frame[_LENGTH.size :]

    def _payload_checked(self) -> bool:
        """Return whether the MAC of the received payload is here and right. Raise if it is wrong."""
        if self._payload is None:
            return True
        if self._have - self._used < TAG_BYTES:
            return False
        self._payload.check(bytes(self._in[self._used : self._used + TAG_BYTES]))
        self._payload = None
        self._used += TAG_BYTES
        return True

    def _decoded(self, body: bytes) -> Wire:
        try:
            return self.decode(memoryview(body))
        except FrameError:
            raise
        except TransportError as error:
            raise FrameError(str(error)) from error

    def _expect(self, message: Wire, size: int, target: Callable[[Wire, int], memoryview | None]) -> None:
        """Start the payload of `message` with the bytes that arrived together with the frame."""
        if size > self.payload_limit:
            raise FrameError(f"{type(message).__name__} with {size} bytes is over the limit of {self.payload_limit}")
        self._message, self._target = message, target(message, size)
        if self._target is not None and self._target.nbytes != size:
            raise FrameError(f"{type(message).__name__} has {size} bytes, there is room for {self._target.nbytes}")
        early = min(size, self._have - self._used)
        if self._receiving is not None and self._receiving.payloads:
            self._payload = self._receiving.payload()
            with memoryview(self._in) as whole:
                self._payload.update(whole[self._used : self._used + early])
        if self._target is not None:
            self._target[:early] = self._in[self._used : self._used + early]
        self._used += early
        self._left = size - early

    def close(self) -> None:
        """Close the socket and release unsent payloads."""
        self.socket.close()
        while self.descriptors:
            os.close(self.descriptors.pop())
        self._message = self._target = None
        while self._out:
            _, done = self._out.popleft()
            if done is not None:
                done()
        self.pending = 0


def decoder_of(kind: Any) -> Decoder:
    """Return a decoder for the message union `kind`, which raises `FrameError` on anything else."""
    decoder = msgspec.msgpack.Decoder(kind)

    def decode(data: memoryview) -> Wire:
        try:
            message: Wire = decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"malformed message: {error}") from error
        return message

    return decode


def _with_descriptors(sock: socket.socket, room: memoryview) -> tuple[int, list[int]]:
    count, ancillary, _, _ = sock.recvmsg_into([room], socket.CMSG_SPACE(4 * _DESCRIPTORS), socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return count, list(found)
