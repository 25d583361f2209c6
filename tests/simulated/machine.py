"""Processes in virtual time, and what stands for threads, sockets, clocks and log files of real agents in them.

Everything else of an agent is the product's: its protocol, links, handshakes, MACs, memory files, records, repairs,
elections and the files of the shared folder.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from keepwarm.ft.agent import agent as agent_module
from keepwarm.ft.agent.workpool import WorkPool
from keepwarm.ft.discovery import shared_folder
from keepwarm.ft.protocol.messages import Attach, Wire, encode
from keepwarm.ft.transport import channel, link, network
from tests.simulated.timeline import Timeline
from tests.simulated.wires import SocketModule, VirtualSelector, VirtualSocket, Wires

WORK_S = 20e-6
"""What a piece of work on memory takes."""
FOLDER_S = 1e-3
"""What one use of the shared folder takes."""
LINES = 400
"""Log lines that are kept of an agent."""


class Process:
    """One process on a host. Once it is dead or while it stands still, nothing of it runs."""

    def __init__(self, machine: Machine, host: str) -> None:
        self.machine, self.host = machine, host
        self.alive = True
        self.sockets: dict[VirtualSocket, None] = {}
        self.selector = VirtualSelector(self)
        self.sent: collections.Counter[str] = collections.Counter()
        """Messages sent to other agents, by type."""
        self._still = False
        self._put_off: list[Callable[[], None]] = []

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.machine.timeline.after(delay, partial(self.do, action))

    def do(self, action: Callable[[], None]) -> None:
        """Run an action as this process."""
        if not self.alive:
            return
        if self._still:
            self._put_off.append(action)
            return
        machine = self.machine
        before, machine.current = machine.current, self
        try:
            action()
        finally:
            machine.current = before

    def stand_still(self) -> None:
        self._still = True

    def go_on(self) -> None:
        self._still = False
        put_off, self._put_off = self._put_off, []
        for action in put_off:
            self.do(action)

    def kill(self) -> None:
        """End without a word. The kernel closes the sockets."""
        self.alive = False
        for each in list(self.sockets):
            each.close()


class Machine:
    """Everything that processes share: time, wires, the storage of the shared folder."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self.wires = Wires(self.timeline)
        self.current: Process | None = None
        self.folder_until = 0.0
        """Until when the shared folder does not answer."""

    def here(self) -> Process:
        assert self.current is not None
        return self.current

    def _encode(self, message: Wire) -> bytes:
        self.here().sent[type(message).__name__] += 1
        return encode(message)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Have agents that are made meanwhile live in virtual time."""
        now = self.timeline.clock
        clocks = SimpleNamespace(monotonic=now, time=now, time_ns=lambda: int(now() * 1e9))
        sockets = SocketModule(self.wires, self.here)
        threads = SimpleNamespace(Thread=_NoThread, Lock=contextlib.nullcontext)
        with contextlib.ExitStack() as stack:
            for module, name, value in (
                (link, "time", clocks),
                (network, "time", clocks),
                (network, "socket", sockets),
                (channel, "encode", self._encode),
                (agent_module, "time", clocks),
                (agent_module, "selectors", SimpleNamespace(DefaultSelector=lambda: self.here().selector)),
                (agent_module, "WorkPool", lambda selector, threads: VirtualPool(self.here())),
                (agent_module, "Journal", lambda path, **always: VirtualJournal(self.timeline)),
                (agent_module, "WorkerSessions", VirtualSessions),
                (shared_folder, "threading", threads),
                (shared_folder, "queue", SimpleNamespace(SimpleQueue=lambda: FolderQueue(self.here()))),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            yield


class _NoThread:
    """Stands for the thread of the shared folder: `FolderQueue` does its work."""

    def __init__(self, **options: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def join(self, timeout: float) -> None:
        pass


class FolderQueue:
    """Does what the shared folder is asked for, one thing after the other, as soon as the storage answers."""

    def __init__(self, process: Process) -> None:
        self._process, self._machine = process, process.machine
        self._jobs: collections.deque[Any] = collections.deque()
        self._busy = False

    def put(self, job: Any) -> None:
        if job is not None:
            self._jobs.append(job)
            self._go_on()

    def _go_on(self) -> None:
        if self._jobs and not self._busy:
            self._busy = True
            self._process.after(FOLDER_S, self._do)

    def _do(self) -> None:
        wait = self._machine.folder_until - self._machine.timeline.now
        if wait > 0:
            self._process.after(wait + FOLDER_S, self._do)
            return
        work, future = self._jobs.popleft()
        self._busy = False
        self._go_on()
        future.set_result(work())


class VirtualPool(WorkPool):
    """The strands of a work pool, without threads: a piece of work takes `WORK_S`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._strands = {}

    def follow(self, future: Future[Any], then: Callable[[Any], None]) -> None:
        future.add_done_callback(lambda done: self._process.after(0.0, lambda: then(done.result())))

    def close(self) -> None:
        pass

    def _submit(self, work: Callable[[], Any], then: Callable[[Any], None] | None) -> None:
        def do() -> None:
            result = work()
            if then is not None:
                then(result)

        self._process.after(WORK_S, do)

    def _later(self, action: Callable[[], None]) -> None:
        self._process.after(0.0, action)


class VirtualJournal:
    """The last lines of an agent's log."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.lines: collections.deque[tuple[float, str, str, dict[str, Any]]] = collections.deque(maxlen=LINES)

    def write(self, level: str, text: str, **fields: Any) -> None:
        self.lines.append((self._timeline.now, level, text, fields))

    def close(self) -> None:
        pass


class VirtualSession:
    """A worker's connection to its agent, without a socket between them."""

    role = "worker"

    def __init__(self, attach: Attach, heard: Callable[[Wire], None]) -> None:
        self.attach, self.attached, self.waits_for_epoch = attach, True, None
        self.link = self
        self._heard = heard

    def send(self, message: Wire) -> None:
        self._heard(message)

    def close(self, reason: str) -> None:
        raise AssertionError(f"the agent refuses its worker: {reason}")


class VirtualSessions:
    """The workers of one node, which are attached from outside."""

    pids: dict[int, int] = {}  # noqa: RUF012
    ended = False

    def __init__(self, selector: Any, path: Any, credentials: Any, memory: Any, handler: Any, former: Any) -> None:
        self.workers: dict[int, VirtualSession] = {}
        self.last_seen = handler.clock()
        self._clock = handler.clock

    def tick(self, now: float) -> None:
        self.last_seen = now

    def send(self, worker: int, message: Wire) -> None:
        if worker in self.workers:
            self.workers[worker].send(message)

    def send_all(self, message: Wire) -> None:
        for worker in self.workers:
            self.send(worker, message)

    def close(self) -> None:
        self.workers.clear()


__all__ = ["Machine", "Process", "VirtualJournal", "VirtualSession"]
