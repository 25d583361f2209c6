"""Whether the network between the nodes carries what a run sends: an echo on the first node, asked by all others."""

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping

BYTES = 4 << 20
"""Sent by each node, and sent back."""
NETWORK_CHECK_TIMEOUT_S = 20.0
"""Seconds that one node may take for it."""


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
    """An echo at this address of this node while the body runs; gives `HOST:PORT`."""
    with _Server((host, 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, name="echo", daemon=True)
        thread.start()
        try:
            yield f"{host}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(NETWORK_CHECK_TIMEOUT_S)


def ask(address: str) -> tuple[float | None, str | None]:
    """Bytes a second, each way, between here and an echo; or None and what is wrong."""
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
    """The nodes that the network does not carry, with why: those that did not reach the first one, or the first one
    itself when most others did not. Pure.

    Args:
        wrong: what each node has to say about its way to the first one; None where all is well.
    """
    others = {name: said for name, said in wrong.items() if name != first}
    lost = {name: said for name, said in others.items() if said is not None}
    if len(lost) > 1 and 2 * len(lost) > len(others):
        return {first: f"is not reached by {', '.join(sorted(lost))}"}
    return lost
