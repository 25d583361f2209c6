"""A worker's side of the socket to its node's agent. Torch-free; one background thread does all I/O.

Training survives the death of an agent: `gone` becomes true, waiting calls raise `AgentError`, the buffers are unmapped
with their last view, and a new client can be created for the next agent.
"""

import collections
import contextlib
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from keepwarm.files import within
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.discovery import config as agent_config
from keepwarm.ft.discovery.config import AgentConfig
from keepwarm.ft.discovery.registry import agents_folder
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.errors import AgentError, AuthenticationFailed, MemoryTooSmall
from keepwarm.ft.keeper import KEEPER_MODULE, SIGNALLED, AgentExit, memory_file
from keepwarm.ft.memory.shared_memory import SharedBuffer
from keepwarm.ft.protocol.messages import (  # fmt: skip
    END_OF_JOB,
    READ_STRIPE,
    Address,
    Attach,
    Attached,
    Cancel,
    Committed,
    EpochBegan,
    Exposed,
    Farewell,
    Granted,
    Hello,
    Introduced,
    Open,
    Part,
    Read,
    Refused,
    Restore,
    Restored,
    Revoked,
    Save,
    Seal,
    SnapshotId,
    StatusRequest,
    Wire,
    WorkerMessage,
)
from keepwarm.ft.transport import auth
from keepwarm.ft.transport.channel import Channel, decoder_of
from keepwarm.ft.transport.link import Credentials, FarEnd, Link
from keepwarm.ft.worker.remote_agent import RemoteAgent, connected

AGENT_START_TIMEOUT_S = 60.0
FOLDER_PATIENCE_S = 2.0
"""How long the start of an agent waits for the shared folder, of which it needs nothing, in seconds."""
GROWTH_POLL_S = 0.02
TICK_S = 1.0
"""How often the deadlines of the connection are checked at least, in seconds."""
TAKEN_RETRY_S = 2.0
"""Time after which an agent is started again if its slot was taken and still does not answer, in seconds."""
STARTS = 4
"""An agent is given up if a signal has ended this many starts: one is an accident, several show that it cannot live."""


def ensure_agent(config: AgentConfig, deadline: float | None = None, *, secret: bytes | None = None) -> None:
    """Start the agent of a slot, detached, unless one is running. Return once its socket answers.

    The deadline is `config.start_seconds` unless given. Without the `secret` the agent reads its file. An agent that a
    signal ends meanwhile is started again.

    Raise `MemoryTooSmall` with the agent's own message if the host cannot hold the buffers, and `AgentError` on any
    other failure.
    """
    if answers(config.socket):
        return
    deadline = config.start_seconds if deadline is None else deadline
    process, words = start_agent(config, secret)
    end, again, killed = time.monotonic() + deadline, time.monotonic() + TAKEN_RETRY_S, 0
    while not answers(config.socket):
        code = process.poll()
        if code is not None and _by_signal(code):
            killed += 1
            if killed < STARTS:
                process, words = start_agent(config, secret)
                continue
        if code is not None and code != AgentExit.TAKEN:
            text = words.read_text().strip().splitlines()
            kind = MemoryTooSmall if code == AgentExit.MEMORY_TOO_SMALL else AgentError
            said = (
                f"the agent ended with {code}"
                if killed < STARTS
                else f"signals have ended {killed} starts of the agent"
            )
            raise kind(text[-1] if text else said)
        if code is not None and time.monotonic() > again:
            # Another process started it first, its keeper starts it again, or the last keeper has not ended yet.
            process, words = start_agent(config, secret)
            again = time.monotonic() + TAKEN_RETRY_S
        if time.monotonic() > end:
            raise AgentError(f"waited {deadline:g} s for the agent of slot {config.slot} to open {config.socket}")
        time.sleep(0.02)


def _by_signal(code: int) -> bool:
    """Return whether a keeper's exit code says that a signal has ended it, or its agent."""
    return code < 0 or code > SIGNALLED


def start_agent(config: AgentConfig, secret: bytes | None = None) -> "tuple[subprocess.Popen[bytes], Path]":
    """Start the keeper of a slot, and with it the agent, detached, without waiting.

    Return its process and the file for its last message. A process that finds the slot taken exits with
    `AgentExit.TAKEN`, one whose agent cannot start with the agent's exit code.
    """
    path = agent_config.write(config)
    words, err = _last_words(config)
    with err, _handed_over(secret) as descriptors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", KEEPER_MODULE, str(path), *map(str, descriptors)],
            stdin=subprocess.DEVNULL, stdout=err, stderr=err, start_new_session=True, cwd="/", pass_fds=descriptors,
        )  # fmt: skip
    with _children_lock:
        _children[:] = [*(child for child in _children if child.poll() is None), process]
    return process, words


def _last_words(config: AgentConfig) -> tuple[Path, BinaryIO]:
    """Open the file for an agent's last message: on the node, if the shared folder takes none."""
    shared = agents_folder(Path(config.shared), config.generation) / f"agent-{config.slot}.err"

    def opened() -> BinaryIO:
        shared.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return shared.open("wb")

    if (file := within(opened, FOLDER_PATIENCE_S)) is not None:
        return shared, file
    here = Path(config.folder) / shared.name
    return here, here.open("wb")


@contextlib.contextmanager
def _handed_over(secret: bytes | None) -> Iterator[tuple[int, ...]]:
    """Yield the descriptor of a memory file that has the secret, for a keeper to inherit; nothing without a secret."""
    if secret is None:
        yield ()
        return
    descriptor = memory_file("secret")
    try:
        os.write(descriptor, secret)
        yield (descriptor,)
    finally:
        os.close(descriptor)


_children_lock = threading.Lock()
_children: "list[subprocess.Popen[bytes]]" = []
"""Kept to prevent the destructor's warning about a child that is meant to outlive this process."""


def answers(path: Path) -> bool:
    """Return whether an agent listens on this socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(str(path))
        return True
    return False


class AgentClient:
    """Connection of one process to its agent. Methods may be called from any thread."""

    def __init__(
        self, agent: Path | RemoteAgent, *, run: str, secret: bytes, worker: int = 0, role: str = "worker",
        deadline: float = AGENT_START_TIMEOUT_S,
    ) -> None:  # fmt: skip
        """Connect and prove mutual knowledge of the secret. Raise `AgentError` or `AuthenticationFailed`.

        Of an agent on another node a process can only `read`, with the role `READER`.
        """
        self._mapped: list[SharedBuffer] = []
        self.run, self.worker, self.deadline = run, worker, deadline
        self.buffers: list[SharedBuffer] = []
        self.epoch = 0
        self.attached: Attached | None = None
        self.exposed = False
        """Whether the agent asks for a snapshot at once."""
        self.commits: collections.deque[Committed] = collections.deque(maxlen=64)
        self._news = threading.Condition()
        self._mail: list[Wire] = []
        self._revoked: set[SnapshotId] = set()
        self._reads: dict[int, tuple[Bytes, int, set[int]]] = {}
        self._why = ""
        remote = agent if isinstance(agent, RemoteAgent) else None
        self._bucket_bytes = 0 if remote is None else remote.bucket_bytes
        limits = None if remote is None else remote.limits
        silence = None if limits is None else limits.silence
        self._tick = TICK_S if silence is None else min(TICK_S, silence / 6)
        self._open = self._interrupted = False
        self._tasks: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        try:
            connection = connected(agent, deadline)
        except AgentError:
            self._selector.close()
            os.close(self._wake)
            raise
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        mine = Hello(role=role, run=run, slot=worker, epoch=0, incarnation=0, nonce=auth.nonce())
        credentials = Credentials(hello=mine, secret=secret, roles=frozenset({"agent"}))
        channel = Channel(connection, decoder_of(WorkerMessage | Status), 64 << 20)
        self._link = Link(channel, self._selector, self, credentials, FarEnd(label=str(agent), dialled=True), limits)
        self._thread = threading.Thread(target=self._serve, name="agent-client", daemon=True)
        self._thread.start()
        with self._news:
            if not self._news.wait_for(lambda: self._open or self._why, deadline):
                self._why = f"waited {deadline:g} s for the agent's handshake"
        if not self._open:
            raise AuthenticationFailed(f"{agent}: {self._why}")

    @property
    def gone(self) -> bool:
        """Whether the agent is gone or has told this process to leave."""
        return bool(self._why)

    # ---- requests

    def attach(self, *, layout: str, workers: int, buckets: int, deadline: float | None = None) -> Attached:
        """Attach this worker and map the buffers, not faulted in. Return once all workers of the node have attached."""
        self._send(Attach(run=self.run, layout=layout, worker=self.worker, workers=workers, buckets=buckets))
        what = f"all {workers} workers of this node to attach"
        self.attached = self._wait(Attached, lambda _: True, deadline, what)
        self.epoch = max(self.epoch, self.attached.epoch)
        return self.attached

    def introduce(self, agents: Mapping[int, Address]) -> None:
        """Tell the agent where the others are: no file is needed to find them."""
        self._send(Introduced(agents=dict(agents)))

    def open(self, snapshot: SnapshotId, *, wait: bool = True, deadline: float | None = None) -> Granted | Refused:
        """Request a buffer for this worker's part of a snapshot. One that is given up is cancelled, granted or not."""
        with self._news:  # an answer to an earlier request may have come too late
            self._mail = [message for message in self._mail if not isinstance(message, (Granted, Refused))]
        self._send(Open(snapshot=snapshot, wait=wait))
        what = f"a buffer for snapshot {snapshot}"
        try:
            answer: Granted | Refused = self._wait((Granted, Refused), lambda m: m.snapshot == snapshot, deadline, what)
        except AgentError:
            with contextlib.suppress(AgentError):
                self.cancel(snapshot)
            raise
        return answer

    def seal(self, snapshot: SnapshotId, sums: tuple[int, ...]) -> None:
        self._send(Seal(snapshot=snapshot, sums=sums))

    def cancel(self, snapshot: SnapshotId) -> None:
        self._send(Cancel(snapshot=snapshot))

    def revoked(self, snapshot: SnapshotId) -> bool:
        """Return whether the agent has revoked a granted snapshot. The worker must answer with `cancel`."""
        return snapshot in self._revoked or self.gone

    def restore(self, epoch: int, *, deadline: float | None = None) -> Restored:
        """Return what epoch `epoch` restores. Begin that epoch if the agents have not."""
        self._send(Restore(epoch=epoch))
        answer: Restored = self._wait(Restored, lambda m: m.epoch >= epoch, deadline, f"the choice of epoch {epoch}")
        self.epoch = max(self.epoch, answer.epoch)
        return answer

    def begin(self, epoch: int) -> None:
        """Make the agents decide what epoch `epoch` restores before its workers ask. For supervisors."""
        self._send(Restore(epoch=epoch))

    def save(self, epoch: int) -> None:
        """Make the agent write to disk what epoch `epoch` restores, once it has it. For supervisors."""
        self._send(Save(epoch=epoch))

    def read(
        self, *, epoch: int, snapshot: SnapshotId, owner: int, first: int, count: int, deadline: float | None = None
    ) -> Bytes:
        """Read buckets of another node's data of the chosen snapshot. Only one call at a time per owner."""
        size = self._bucket_bytes
        missing = set(range(first, first + count))
        room = np.empty(count * size, np.uint8)
        with self._news:
            self._reads[owner] = room, first, missing
        self._send(Read(epoch=epoch, snapshot=snapshot, owner=owner, first=first, count=count))
        try:
            self._until(lambda: not missing, deadline, f"bytes of node {owner}")
        finally:
            with self._news:
                del self._reads[owner]
        return room

    def status(self, deadline: float | None = None) -> Status:
        self._send(StatusRequest())
        answer: Status = self._wait(Status, lambda _: True, deadline, "the agent's status")
        return answer

    def wait_until_grown(self, deadline: float) -> None:
        """Return once the agent has taken all of its memory. Raise `AgentError` after the deadline, in seconds."""
        end = time.monotonic() + deadline
        while (status := self.status()).grown_bytes < status.memory_bytes:
            if time.monotonic() > end:
                sizes = f"{status.grown_bytes} of {status.memory_bytes} bytes"
                raise AgentError(f"waited {deadline:g} s for the agent to take its memory, it has {sizes}")
            time.sleep(GROWTH_POLL_S)

    def interrupt(self) -> None:
        """Make all pending and future calls raise `AgentError` immediately."""
        with self._news:
            self._interrupted = True
            self._news.notify_all()

    def detach(self) -> list[SharedBuffer]:
        """Return the buffers, which stay mapped for the next client. This one can only be closed."""
        buffers, self.buffers, self._mapped = [*self.buffers, *self._mapped], [], []
        return buffers

    def reuse(self, buffers: Sequence[SharedBuffer]) -> None:
        """Keep those mapped, of the agent before, that this one has too when `attach` is answered. Take all."""
        self._mapped = list(buffers)

    def _buffer(self, descriptor: int, size: int) -> SharedBuffer:
        """Return the mapping of a memfd: the one that there is, if there is one. Take the descriptor."""
        for buffer in self._mapped:
            if buffer.maps(descriptor, size):
                os.close(descriptor)
                self._mapped.remove(buffer)
                return buffer
        return SharedBuffer(descriptor, size)

    def _close_mapped(self) -> None:
        for buffer in self._mapped:
            buffer.close()
        self._mapped = []

    def close(self, *, end_of_job: bool = False) -> None:
        """Unmap the buffers and say farewell. With `end_of_job` the agent exits once all workers have done so."""
        for buffer in self.buffers:
            buffer.close()
        self._close_mapped()
        self.buffers, self._interrupted = [], False
        if not self.gone:
            self._send(Farewell(reason=END_OF_JOB if end_of_job else "this worker is done"))
            with contextlib.suppress(AgentError):
                self._until(lambda: self.gone, 5.0, "the agent to take leave")
        if self._wake < 0:
            return
        self._post(lambda: self._link.close("closed"))
        self._thread.join(5.0)
        if not self._thread.is_alive():
            os.close(self._wake)
            self._wake = -1

    # ---- Handler, on the thread

    def connected(self, link: Link) -> None:
        with self._news:
            self._open = True
            self._news.notify_all()

    def refused(self, link: Link, reason: str) -> None:
        with self._news:
            self._why = self._why or reason
            self._news.notify_all()

    def lost(self, link: Link, reason: str) -> None:
        self.refused(link, reason)

    def target(self, link: Link, message: Wire, size: int) -> memoryview | None:
        if not isinstance(message, Part) or message.stripe != READ_STRIPE:
            return None
        with self._news:
            room, first, missing = self._reads.get(message.owner, (np.empty(0, np.uint8), 0, set()))
        start = (message.index - first) * self._bucket_bytes
        if message.index not in missing or start + size > len(room):
            return None
        return room[start : start + size].data

    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None:
        with self._news:
            if isinstance(message, Part):
                self._part(link, message, payload)
            elif isinstance(message, Revoked):
                self._revoked.add(message.snapshot)
            elif isinstance(message, Committed):
                self.commits.append(message)
                self._revoked = {each for each in self._revoked if each.age > message.snapshot.age}
            elif isinstance(message, Exposed):
                self.exposed = message.exposed
            elif isinstance(message, EpochBegan):
                self.epoch = max(self.epoch, message.epoch)
            elif isinstance(message, Farewell):
                self._why = message.reason
            else:
                if isinstance(message, Attached):
                    self.exposed, self._bucket_bytes = message.exposed, message.bucket_bytes
                    descriptors, link.channel.descriptors = link.channel.descriptors, []
                    self.buffers = [self._buffer(descriptor, message.buffer_bytes) for descriptor in descriptors]
                    self._close_mapped()
                self._mail.append(message)
            self._news.notify_all()

    def drained(self, link: Link) -> None:
        return

    def _part(self, link: Link, part: Part, payload: memoryview | None) -> None:
        """Store bytes for `read`, which may have given up by now. Request a damaged bucket again."""
        waiting = self._reads.get(part.owner)
        if payload is None or waiting is None:
            return
        if xxhash.xxh3_64_intdigest(payload) == part.sum:
            waiting[2].discard(part.index)
        else:
            index = part.index
            link.send(Read(epoch=part.epoch, snapshot=part.snapshot, owner=part.owner, first=index, count=1))

    # ---- internals

    def _serve(self) -> None:
        """Run the thread: drive one selector until the link is closed. Whatever ends it is said to those who wait."""
        try:
            self._drive()
        except Exception as error:
            self.refused(self._link, f"the connection to it failed: {error!r}")
            self._link.close("failed")
            self._selector.close()

    def _drive(self) -> None:
        while not self._link.closed:
            for key, mask in self._selector.select(self._tick):
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                else:
                    key.data.ready(mask)
            while self._tasks:
                self._tasks.popleft()()
            self._link.tick(time.monotonic())
        self._selector.close()

    def _post(self, task: Callable[[], None]) -> None:
        self._tasks.append(task)
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _send(self, message: Wire) -> None:
        if self.gone:
            raise AgentError(f"the agent has gone: {self._why}")
        self._post(lambda: self._link.send(message))

    def _until(self, ready: Callable[[], bool], deadline: float | None, what: str) -> None:
        limit = self.deadline if deadline is None else deadline
        with self._news:
            if not self._news.wait_for(lambda: ready() or self.gone or self._interrupted, limit):
                raise AgentError(f"worker {self.worker} waited {limit:g} s for {what}")
            if self._interrupted and not ready():
                raise AgentError(f"worker {self.worker} was interrupted while it waited for {what}")
            if not ready():
                raise AgentError(f"worker {self.worker} waited for {what}, the agent has gone: {self._why}")

    def _wait(self, kind: Any, fits: Callable[[Any], bool], deadline: float | None, what: str) -> Any:
        found: list[Wire] = []

        def ready() -> bool:
            if not found:
                found.extend([m for m in self._mail if isinstance(m, kind) and fits(m)][:1])
            return bool(found)

        self._until(ready, deadline, what)
        with self._news:
            self._mail.remove(found[0])
        return found[0]
