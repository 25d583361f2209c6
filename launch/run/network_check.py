"""Check the network between nodes: every node sends data to an echo server on the first node."""

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping

BYTES = 4 << 20
"""Bytes that each node sends and receives back."""
NETWORK_CHECK_TIMEOUT_S = 20.0
"""Timeout of the check on one node."""


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        connection: socket.socket = self.request
        connection.settimeout(NETWORK_CHECK_TIMEOUT_S)
        left = BYTES
        with contextlib.suppress(OSError):
            while left and (data := connection.recv(min(left, 1 << 16))):
                connection.sendall(data)
                left -= len(data)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096


@contextlib.contextmanager
def echo(host: str) -> Iterator[str]:
    """Run an echo server at this address of this node inside the block; yield `HOST:PORT`."""
    with _Server((host, 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, name="echo", daemon=True)
        thread.start()
        try:
            yield f"{host}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(NETWORK_CHECK_TIMEOUT_S)


def ask(address: str) -> tuple[float | None, str | None]:
    """Return the bytes per second to and from an echo server, each way; or None and the problem."""
    host, _, port = address.rpartition(":")
    sent = os.urandom(BYTES)
    received = bytearray()
    started = time.perf_counter()
    try:
        with socket.create_connection((host, int(port)), timeout=NETWORK_CHECK_TIMEOUT_S) as connection:
            sender = threading.Thread(target=_send, args=(connection, sent), daemon=True)
            sender.start()
            while len(received) < BYTES and (data := connection.recv(1 << 16)):
                received += data
            sender.join(NETWORK_CHECK_TIMEOUT_S)
    except OSError as error:
        return None, f"cannot reach {address}: {error}"
    if received != sent:
        return None, f"got {len(received)} bytes back from {address}, not the {BYTES} that were sent"
    return 2 * BYTES / (time.perf_counter() - started), None


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)


def apart(wrong: Mapping[str, str | None], first: str) -> dict[str, str]:
    """Return the unreachable nodes with the reason: those that did not reach the first node, or the first node itself
    if most others did not reach it. Pure.

    Args:
        wrong: by node, the problem in reaching the first node; None if there is none.
    """
    others = {name: said for name, said in wrong.items() if name != first}
    lost = {name: said for name, said in others.items() if said is not None}
    if len(lost) > 1 and 2 * len(lost) > len(others):
        return {first: f"is not reached by {', '.join(sorted(lost))}"}
    return lost
