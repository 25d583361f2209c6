"""Accept connections from strangers without letting them take anything: no error ends the listening process, and those
that have not proved that they know the secret are few.
"""

import contextlib
import ipaddress
import os
import selectors
import socket
from typing import Any

from keepwarm.ft.transport.link import Link

STRANGERS = 512
"""Maximum links of one listener whose other side has not identified itself."""
STRANGERS_PER_ADDRESS = 128


class Listener:
    """A listening socket, watched by a selector for its owner, which calls `accept` and `tick`."""

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector, owner: Any) -> None:
        """Take ownership of a socket that listens."""
        sock.setblocking(False)
        self.socket, self._selector, self._owner = sock, selector, owner
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._watched = False
        self.shed = 0
        """Connections closed unread because the process or the machine was out of descriptors."""
        self._watch()

    def accept(self) -> tuple[socket.socket, Any] | None:
        """Accept a waiting connection. Return None if there is none, or if it could not be taken and was shed."""
        try:
            return self.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return None
        except OSError:
            self._shed()
            return None

    def tick(self) -> None:
        """Listen again after a rest."""
        if not self._watched:
            self._watch()

    def close(self) -> None:
        self._unwatch()
        self.socket.close()
        self._close_spare()

    def _shed(self) -> None:
        """Close one waiting connection with the descriptor kept for it, and rest: it would stay readable for ever."""
        self.shed += 1
        self._close_spare()
        with contextlib.suppress(OSError):
            self.socket.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._unwatch()

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # no kernel memory for one more watch: the next tick tries again
            self._selector.register(self.socket, selectors.EVENT_READ, self._owner)
            self._watched = True

    def _unwatch(self) -> None:
        if self._watched:
            self._selector.unregister(self.socket)
            self._watched = False


class Strangers:
    """Accepted links whose other side has not identified itself yet, oldest first by address.

    Where there are too many, the oldest link of the address with the most is closed: an honest handshake takes
    milliseconds, so this meets those that only wait.
    """

    def __init__(self, total: int = STRANGERS, each: int = STRANGERS_PER_ADDRESS) -> None:
        self._total, self._each = total, min(each, total)
        self._by_address: dict[str, dict[Link, None]] = {}
        self._address: dict[Link, str] = {}

    def __len__(self) -> int:
        return len(self._address)

    def add(self, link: Link, address: str) -> None:
        """Count a new link, and close another one if that is needed to stay within the limits."""
        address = network_of(address)
        self._by_address.setdefault(address, {})[link] = None
        self._address[link] = address
        if len(self._by_address[address]) > self._each:
            self._close_oldest(address)
        elif len(self._address) > self._total:
            self._close_oldest(max(self._by_address, key=lambda each: len(self._by_address[each])))

    def discard(self, link: Link) -> None:
        """Forget a link that has closed or identified itself."""
        address = self._address.pop(link, None)
        if address is not None:
            here = self._by_address[address]
            del here[link]
            if not here:
                del self._by_address[address]

    def close_oldest(self) -> None:
        """Free a descriptor, if a stranger holds one."""
        if self._address:
            self._close_oldest(max(self._by_address, key=lambda each: len(self._by_address[each])))

    def _close_oldest(self, address: str) -> None:
        oldest = next(iter(self._by_address[address]))
        self.discard(oldest)
        oldest.close("too many connections wait to identify themselves")


def network_of(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the 64 bits of an IPv6 network, which one host owns."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
