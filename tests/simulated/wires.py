"""A network in memory: stream sockets between hosts with latency and bandwidth, and a selector over them.

A pair of hosts that is cut delivers what was sent when it is healed, as TCP does; a host that is gone answers nothing.
"""

from __future__ import annotations

import collections
import errno
import selectors
import socket
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.simulated.timeline import Timeline

if TYPE_CHECKING:
    from tests.simulated.machine import Process

LATENCY_S = 50e-6
BANDWIDTH = 12.5e9
"""Bytes per second that leave a host."""
WINDOW = 1 << 20
"""Bytes that may be on their way to a reader on one connection."""
HEADER = 60
"""Bytes that a packet without data costs."""
TURN_S = 5e-6
"""From readiness to the process that handles it."""


class Wires:
    """What connects the hosts."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.listeners: dict[tuple[str, int], VirtualSocket] = {}
        self.gone: set[str] = set()
        """Hosts without power."""
        self.cut: set[frozenset[str]] = set()
        self.alone: set[str] = set()
        """Hosts that are cut off from all others."""
        self.damaged: set[str] = set()
        """Hosts whose next packet with data loses a bit."""
        self.bytes = 0
        """Bytes of data that were sent."""
        self._leaves: dict[str, float] = {}
        self._held: list[tuple[str, str, Callable[[], None]]] = []
        self._port = 40_000

    def port(self) -> int:
        self._port += 1
        return self._port

    def carry(self, source: str, target: str, size: int, arrived: Callable[[], None]) -> None:
        """Bring a packet to a host."""
        now = self.timeline.now
        leaves = max(now, self._leaves.get(source, 0.0)) + (HEADER + size) / BANDWIDTH
        self._leaves[source] = leaves
        self.timeline.after(leaves - now + LATENCY_S, partial(self._arrive, source, target, arrived))

    def _arrive(self, source: str, target: str, arrived: Callable[[], None]) -> None:
        if target in self.gone or source in self.gone:
            return
        if self._apart(source, target):
            self._held.append((source, target, arrived))
        else:
            arrived()

    def _apart(self, one: str, other: str) -> bool:
        if one == other or not (self.alone or self.cut):
            return False
        return one in self.alone or other in self.alone or frozenset((one, other)) in self.cut

    def heal(self) -> None:
        """Deliver what could not be delivered, where hosts reach each other again."""
        held, self._held = self._held, []
        for source, target, arrived in held:
            if self._apart(source, target):
                self._held.append((source, target, arrived))
            else:
                self.timeline.after(LATENCY_S, lambda s=source, t=target, a=arrived: self._arrive(s, t, a))  # type: ignore[misc]


class VirtualSocket:
    """A stream socket of a process: what `keepwarm.ft.transport` uses of one."""

    family = socket.AF_INET

    def __init__(self, wires: Wires, process: Process) -> None:
        self._wires, self.process = wires, process
        self.peer: VirtualSocket | None = None
        self.address: tuple[str, int] = (process.host, 0)
        self._in: collections.deque[memoryview] = collections.deque()
        self._waiting: collections.deque[tuple[VirtualSocket, tuple[str, int]]] = collections.deque()
        self._error = self._unread = 0
        self._connected = self._ended = self._closed = self._listens = False
        process.sockets[self] = None

    # ---- the other end, and time

    @property
    def readiness(self) -> int:
        """What a selector would report."""
        read = self._in or self._waiting or self._ended or self._error
        write = self._error or (self._connected and self._unread < WINDOW)
        return (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)

    def touch(self) -> None:
        self.process.selector.touch(self)

    def _to_peer(self, size: int, act: Callable[[VirtualSocket], None]) -> None:
        peer = self.peer
        if peer is not None:
            self._wires.carry(self.process.host, peer.process.host, size, lambda: act(peer))

    def _take(self, data: bytes) -> None:
        if self._closed:
            self._to_peer(0, lambda peer: peer._reset())
        elif not self._error:
            self._in.append(memoryview(data))
            self.touch()

    def _end(self) -> None:
        self._ended = True
        self.touch()

    def _reset(self) -> None:
        if not self._closed:
            self._error = errno.ECONNRESET
            self.touch()

    def _read_by_peer(self, count: int) -> None:
        self._unread -= count
        self.touch()

    # ---- what a socket does

    def setblocking(self, flag: bool) -> None:
        """Do nothing: it never blocks."""

    def setsockopt(self, *arguments: Any) -> None:
        """Do nothing."""

    def getsockopt(self, level: int, option: int) -> int:
        return self._error

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def listen_on(self, host: str) -> None:
        self.address, self._listens = (host, self._wires.port()), True
        self._wires.listeners[self.address] = self

    def connect(self, address: tuple[str, int]) -> None:
        def asked() -> None:
            listener = self._wires.listeners.get(address)
            if self._closed:
                return
            if listener is None:
                self._wires.carry(address[0], self.process.host, 0, self._refused)
                return
            other = VirtualSocket(self._wires, listener.process)
            other.peer, self.peer, other._connected = self, other, True
            listener._waiting.append((other, (self.process.host, 0)))
            listener.touch()
            other._to_peer(0, lambda peer: peer._answered())

        self._wires.carry(self.process.host, address[0], 0, asked)
        raise BlockingIOError

    def _refused(self) -> None:
        self._error = errno.ECONNREFUSED
        self.touch()

    def _answered(self) -> None:
        self._connected = True
        if self._closed:
            self._to_peer(0, lambda peer: peer._end())
        else:
            self.touch()

    def accept(self) -> tuple[VirtualSocket, tuple[str, int]]:
        if not self._waiting:
            raise BlockingIOError
        return self._waiting.popleft()

    def sendmsg(self, views: Iterable[memoryview], ancillary: Any) -> int:
        if self._error:
            raise OSError(self._error, "the connection is gone")
        room = WINDOW - self._unread if self._connected else 0
        data = b"".join(views)[:room] if room > 0 else b""
        if not data:
            raise BlockingIOError
        if self.process.host in self._wires.damaged:
            self._wires.damaged.discard(self.process.host)
            data = data[:-1] + bytes([data[-1] ^ 0x10])
        self._unread += len(data)
        self._wires.bytes += len(data)
        self._to_peer(len(data), lambda peer: peer._take(data))
        return len(data)

    def recv_into(self, room: memoryview) -> int:
        if not self._in:
            if self._error:
                raise OSError(self._error, "the connection is gone")
            if self._ended:
                return 0
            raise BlockingIOError
        data = self._in.popleft()
        count = min(len(data), len(room))
        room[:count] = data[:count]
        if count < len(data):
            self._in.appendleft(data[count:])
        self._to_peer(0, lambda peer: peer._read_by_peer(count))
        return count

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.process.sockets.pop(self, None)
        if self._listens:
            self._wires.listeners.pop(self.address, None)
            for other, _ in self._waiting:
                other.close()
        self._to_peer(0, lambda peer: peer._end())


class VirtualSelector:
    """A selector over virtual sockets. It hands out what is ready by itself, when its process runs."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._map: dict[Hashable, tuple[int, Any]] = {}
        self._touched: dict[Any, None] = {}
        self._due = False

    def register(self, file: Any, events: int, data: Any = None) -> None:
        if file in self._map:
            raise KeyError(file)
        self._map[file] = events, data
        self.touch(file)

    def modify(self, file: Any, events: int, data: Any = None) -> None:
        self._map[file] = events, data
        self.touch(file)

    def unregister(self, file: Any) -> None:
        del self._map[file]

    def close(self) -> None:
        self._map.clear()

    def touch(self, file: Any) -> None:
        """Look at a file that may have become ready."""
        self._touched[file] = None
        if not self._due:
            self._due = True
            self._process.after(TURN_S, self._turn)

    def _turn(self) -> None:
        self._due = False
        touched, self._touched = self._touched, {}
        for file in touched:
            events, data = self._map.get(file, (0, None))
            if ready := file.readiness & events:
                data.ready(ready)
                events, _ = self._map.get(file, (0, None))
                if file.readiness & events:
                    self.touch(file)


class SocketModule:
    """Stands for the module `socket` where agents open connections."""

    def __init__(self, wires: Wires, current: Callable[[], Process]) -> None:
        self._wires, self._current = wires, current

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socket(self, *arguments: Any) -> VirtualSocket:
        return VirtualSocket(self._wires, self._current())

    def create_server(self, address: tuple[str, int], **options: Any) -> VirtualSocket:
        listening = VirtualSocket(self._wires, self._current())
        listening.listen_on(address[0])
        return listening

    def getaddrinfo(self, host: str, port: int, **options: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port))]


__all__ = ["BANDWIDTH", "LATENCY_S", "SocketModule", "VirtualSelector", "VirtualSocket", "Wires"]
