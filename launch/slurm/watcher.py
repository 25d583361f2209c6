"""Watcher of a SLURM job on each node but the first: `python -P -m keepwarm.launch.slurm.watcher RUN HOST:PORT KIND`.

The batch script on the first node decides what follows when ranks have ended. When that node dies, SLURM keeps the
others allocated, for supervisors to go on there, and nothing decides. So the batch script sends a byte to each watcher
every few seconds. A watcher that hears nothing for a while waits until no supervisor runs on its node, and then ends or
requeues the job; the watchers take turns. Imports little before that, because it runs on every node at every start.
"""

import contextlib
import os
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from keepwarm.launch.slurm.commands import own_id

BEAT_S = 2.0
"""How often the batch script tells that it lives."""
SILENCE_S = 15.0
"""Silence after which the batch script has died."""
IDLE_S = 10.0
"""How long no supervisor has run on a node before its watcher acts: the next start may just have begun."""
TURN_S = 4.0
"""How much longer each further watcher waits, so that one after the other acts."""
SPARE_LINKS = 64
"""Connections that are accepted beyond two for each node: a stranger must not take the script's descriptors."""
SOCKET = "KEEPWARM_WATCHER"
"""Environment variable with the name of the local socket of a job's watchers. It is random, so that no other user of a
node can take it first, and abstract, so that a container needs no folder for it.
"""
_PEER = struct.Struct("3i")


# ---- on the first node


@contextlib.contextmanager
def watched(nodes: Sequence[str], step: Callable[[str], list[str]]) -> Iterator[None]:
    """Run watchers on all nodes but the first inside the block; `step` returns the command for an address to watch.

    Sets KEEPWARM_WATCHER, for these and all later steps of the job.
    """
    from keepwarm.trainer.distributed.launcher_environment import own_address

    host = own_address(nodes[1]) if nodes[1:] else None
    if host is None:
        yield
        return
    stop = threading.Event()
    with socket.create_server((host, 0), backlog=4096) as server:
        server.setblocking(False)
        most = 2 * len(nodes) + SPARE_LINKS
        beats = threading.Thread(target=beat, args=(server, stop, most), name="beat", daemon=True)
        beats.start()
        os.environ[SOCKET] = f"keepwarm-{secrets.token_hex(16)}"
        resources = ("SLURM_GPUS", "SLURM_GRES", "SLURM_TRES", "SLURM_MEM")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(resources)}
        # In its own session: a signal to the batch script must not end the watchers.
        watchers = subprocess.Popen(
            step(f"{host}:{server.getsockname()[1]}"), env=kept,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            watchers.terminate()
            stop.set()
            beats.join(BEAT_S + 1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                watchers.wait(BEAT_S)


def beat(server: socket.socket, stop: threading.Event, most: int, interval: float = BEAT_S) -> None:
    """Send a byte to each connection until `stop`, at most to `most` of them. No error of a socket ends it."""
    links: list[socket.socket] = []
    while not stop.wait(interval):
        with contextlib.suppress(OSError):  # nothing waits, or it went away, or descriptors are short: again later
            while len(links) < most:
                link, _ = server.accept()
                link.setblocking(False)
                links.append(link)
        links = [link for link in links if _is_sent(link)]
    for link in links:
        link.close()


def _is_sent(link: socket.socket) -> bool:
    try:
        link.send(b".")
    except BlockingIOError:
        return True  # a watcher that does not read
    except OSError:
        link.close()
        return False
    return True


# ---- on the other nodes


@contextlib.contextmanager
def reported(environment: Mapping[str, str]) -> Iterator[Callable[[int], None]]:
    """Have the watcher of this node know that a supervisor runs inside the block; yield what takes its exit code."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(SILENCE_S)
        if SOCKET in environment:
            with contextlib.suppress(OSError):  # on the first node there is none
                link.connect(f"\0{environment[SOCKET]}")

        def report(code: int) -> None:
            with contextlib.suppress(OSError):
                link.sendall(b"%d\n" % code)

        yield report


def due(*, now: float, heard: float, idle_since: float | None, place: int) -> bool:
    """Return whether a watcher is to act. Pure.

    Args:
        now, heard, idle_since: times; of the last sign of the batch script, and of the end of this node's supervisor,
            or None while it runs.
        place: 0 for the first watcher.
    """
    if idle_since is None:
        return False
    return now > max(heard + SILENCE_S, idle_since + IDLE_S) + TURN_S * place


class Watcher:
    """Watches the batch script and the supervisor of this node."""

    def __init__(self, folder: Path, address: str, kind: str, environment: Mapping[str, str]) -> None:
        self.folder, self._environment, self._kind = folder, environment, kind
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._place = int(environment.get("SLURM_PROCID", "0"))
        self._heard = self._idle_since = time.monotonic()
        self._retry_at = 0.0
        self._running: set[socket.socket] = set()
        self.code: int | None = None
        """Exit code of the last supervisor on this node."""
        self._selector = selectors.DefaultSelector()
        self._local = socket.socket(socket.AF_UNIX)
        self._local.bind(f"\0{environment[SOCKET]}")
        self._local.listen()
        self._selector.register(self._local, selectors.EVENT_READ, self._on_supervisor)
        self._link: socket.socket | None = None

    def wait(self) -> None:
        """Return when the batch script has died, and nothing trains on this node."""
        while not self._is_due():
            self._connect()
            for key, _ in self._selector.select(1.0):
                key.data(key.fileobj)

    def pause(self) -> None:
        """Be due again somewhat later, if then nothing trains."""
        self._idle_since = time.monotonic()

    def _is_due(self) -> bool:
        # Ranks under srun alone end with the node of their step's first rank: nothing is waited for.
        trains = self._kind == "node" and bool(self._running)
        idle_since = None if trains else self._idle_since
        return due(now=time.monotonic(), heard=self._heard, idle_since=idle_since, place=self._place)

    def _connect(self) -> None:
        if self._link is not None or time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + BEAT_S
        with contextlib.suppress(OSError):
            self._link = socket.create_connection(self._target, timeout=BEAT_S)
            self._selector.register(self._link, selectors.EVENT_READ, self._on_beat)

    def _on_beat(self, link: socket.socket) -> None:
        try:
            heard = bool(link.recv(64))
        except OSError:
            heard = False
        if heard:
            self._heard = time.monotonic()
        else:
            self._close(link)
            self._link = None

    def _on_supervisor(self, server: socket.socket) -> None:
        try:
            link, _ = server.accept()
        except OSError:
            return  # it went away
        _, user, _ = _PEER.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if user != os.getuid():
            link.close()
            return
        self.code = None
        self._running.add(link)
        self._selector.register(link, selectors.EVENT_READ, self._on_report)

    def _on_report(self, link: socket.socket) -> None:
        text = b""
        with contextlib.suppress(OSError):
            text = link.recv(16)
        if text.strip().isdigit():
            self.code = int(text)
        if not text:
            self._running.discard(link)
            self._close(link)
            self._idle_since = time.monotonic()

    def _close(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        link.close()


def main() -> None:
    folder, address, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    # SLURM sends these to all tasks, to have the ranks save their state.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    watcher = Watcher(folder, address, kind, os.environ)
    while True:
        watcher.wait()
        # Loads what reads jobs: until now this process was to cost little.
        from keepwarm.launch.slurm.handover import settle

        if settle(folder, own_id(os.environ), watcher.code):
            return
        watcher.pause()


if __name__ == "__main__":
    main()
