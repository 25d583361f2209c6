"""Which process of this machine has opened a loopback connection. Linux knows it; an address says nothing.

A socket has an inode, and a process holds it open. Linux tells the inode of the other end of a connection through
netlink (`sock_diag`), at once, and in the tables of /proc, which take it milliseconds to write.
"""

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from keepwarm.launch.node.options import LOOPBACK

Address = tuple[str, int]
Inodes = Callable[[Collection[Address], Address], dict[Address, int]]
TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST = 4, 20, 1
ANSWER_TIMEOUT_S = 1.0
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBxxI")
"""Family, protocol, states."""
_SOCKET = struct.Struct("!HH4s12x4s12xIII")
"""Both ports and addresses as seen from the caller, any interface, and a cookie, here of any value."""
_ANSWER = struct.Struct(f"=4x{_SOCKET.size}x16xI")
"""The inode, after the connection, its timers, queues and user."""
_ANY = 0xFFFFFFFF


def from_netlink(callers: Collection[Address], listening: Address) -> dict[Address, int]:
    """Return the inode of the other end of each connection to `listening` that is open there. Raises OSError."""
    found: dict[Address, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(ANSWER_TIMEOUT_S)
        for caller in callers:
            ends = (caller[1], listening[1], socket.inet_aton(caller[0]), socket.inet_aton(listening[0]))
            request = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, _ANY) + _SOCKET.pack(*ends, 0, _ANY, _ANY)
            size = _HEADER.size + len(request)
            netlink.send(_HEADER.pack(size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0) + request)
            answer = netlink.recv(1 << 13)
            if _HEADER.unpack_from(answer)[1] == SOCK_DIAG_BY_FAMILY:
                (inode,) = _ANSWER.unpack_from(answer, _HEADER.size)
                if inode:
                    found[caller] = inode
    return found


def from_tables(callers: Collection[Address], listening: Address) -> dict[Address, int]:
    """Do the same as `from_netlink`, where that does not work."""
    here = _label(listening)
    inodes: dict[str, int] = {}
    for table in TABLES:
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(table).read_text(encoding="ascii").splitlines():
                if here in line:
                    # An IPv4 address in the table of IPv6 ends with the same digits.
                    _, local, remote, *rest = line.split()
                    if remote.endswith(here):
                        inodes[local[-len(here) :]] = int(rest[6])
    return {caller: inodes[_label(caller)] for caller in callers if inodes.get(_label(caller))}


WAYS: tuple[Inodes, ...] = (from_netlink, from_tables)


def _label(address: Address) -> str:
    host, port = address
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"


def listen() -> tuple[socket.socket, Inodes]:
    """Return a socket that listens at the loopback interface, and the way to know who calls. Raises OSError."""
    sock = socket.create_server((LOOPBACK, 0), backlog=4096)
    try:
        return sock, _way_of_this_machine(sock.getsockname())
    except OSError:
        sock.close()
        raise


def _way_of_this_machine(listening: Address) -> Inodes:
    """Return the way that works here, tried with a connection of this process. Raises OSError if none does."""
    with socket.create_connection(listening, ANSWER_TIMEOUT_S) as probe:
        mine: Address = probe.getsockname()
        for way in WAYS:
            for _ in range(3):  # a table that changes while it is read may lack a line
                with contextlib.suppress(OSError):
                    inode = way([mine], listening).get(mine)
                    if inode is not None and holds([os.getpid()], inode):
                        return way
    raise OSError("Linux does not tell which process has connected")


def holds(pids: Iterable[int], inode: int) -> bool:
    """Return whether one of the processes, all of this user, has the socket with this inode open."""
    wanted = f"socket:[{inode}]"
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            folder = f"/proc/{pid}/fd"
            for name in os.listdir(folder):  # noqa: PTH208  a worker may have thousands
                try:
                    if os.readlink(f"{folder}/{name}") == wanted:  # noqa: PTH115
                        return True
                except FileNotFoundError:  # closed meanwhile
                    continue
    return False
