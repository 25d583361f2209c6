"""In-process restart: a worker whose peers have died parks, and is resumed for the next start in the same process.

It keeps its imports, allocations and caches, which a new process pays for until the end of its first step. Its
supervisor asks it to park; collectives that wait for dead or parking peers then fail (`World.interrupt`). The worker
leaves its agent, drops its engine and process groups, reports that it is parked, and waits for the environment of the
next start. A worker that is not training, or does not park in time, ends: a new process always works.
"""

import contextlib
import gc
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from keepwarm.exit_code import ExitCode
from keepwarm.parallel.engine_support import engine_info
from keepwarm.trainer.distributed.device_errors import broken
from keepwarm.trainer.job.spec import JobSpec

CONTROL = "KEEPWARM_CONTROL"
"""Environment variable: the descriptor of the socket through which a supervisor parks and resumes its worker."""
EPOCH = "KEEPWARM_EPOCH"
"""Environment variable of rank 0: the agents' decision on what to restore that a supervisor has already begun."""
RECOVERY = "KEEPWARM_RECOVERY"
"""Environment variable of rank 0: what the supervisors know of the failure that this start recovers from, as JSON."""
AGENTS = "KEEPWARM_AGENTS"
"""Environment variable: the number of the layout whose agents ranks use, and who holds the state of the one before, as
JSON."""
PER_START = (EPOCH, RECOVERY, AGENTS)
"""Variables that hold for one start only."""
PARK_ORDER_TIMEOUT_S = 5.0
"""How long a worker whose collective has failed waits for the order to park before it fails itself."""
_MESSAGE_BYTES = 1 << 18
WorkerState = Literal["training", "parked"]
"""training: can be parked from now on; parked: waits to be resumed."""


def supports_in_process_restart(job: JobSpec) -> bool:
    """Return whether a job's workers may be resumed in their process; workers with a GPU decide by themselves."""
    return job.cluster.in_process != "off" and engine_info(job.parallel).in_process


class Park(msgspec.Struct, frozen=True, tag=True):
    """To a training worker: park."""


class Resume(msgspec.Struct, frozen=True, tag=True):
    """To a parked worker: start again with these environment variables."""

    environment: dict[str, str]


class Report(msgspec.Struct, frozen=True):
    """From a worker: its new state."""

    state: WorkerState


class RestartRequested(Exception):
    """This start is over, and the process goes on to the next one."""


class ControlChannel:
    """The worker's end of the socket to its supervisor. Without a connection the worker is never parked."""

    def __init__(self, connection: socket.socket | None) -> None:
        self.resumed_at: float | None = None
        """When the worker was last resumed, in seconds since 1970; None in the first start of a process."""
        self._connection = connection
        self._lock = threading.Lock()
        self._interrupt: Callable[[], None] | None = None
        self._asked_to_park = threading.Event()
        self._resume: queue.SimpleQueue[Resume] = queue.SimpleQueue()
        if connection is not None:
            threading.Thread(target=self._listen, args=(connection,), name="control", daemon=True).start()

    @classmethod
    def inherited(cls) -> "ControlChannel":
        """Return the channel to the process that started this one."""
        descriptor = os.environ.pop(CONTROL, None)
        return cls(None if descriptor is None else socket.socket(fileno=int(descriptor)))

    @contextlib.contextmanager
    def training(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Allow parking inside the `with` block; `interrupt` is called on another thread to end blocking calls.

        Raises:
            RestartRequested: in place of the error that the interruption caused.
        """
        if self._connection is None:
            yield
            return
        with self._lock:
            self._interrupt = interrupt
        self._report("training")
        try:
            yield
        except Exception as error:
            if broken(error) is not None:
                raise  # the process cannot use its GPU again
            # A collective fails when its peer dies, often before the supervisors know.
            if self._asked_to_park.wait(PARK_ORDER_TIMEOUT_S if isinstance(error, RuntimeError) else 0.0):
                raise RestartRequested((str(error).strip() or type(error).__name__).splitlines()[0]) from error
            raise
        finally:
            with self._lock:
                self._interrupt = None
        if self._asked_to_park.is_set():
            raise RestartRequested("between two steps")

    def park(self) -> None:
        """Park this worker; return when it is resumed, with the environment variables of the next start set."""
        assert self._connection is not None
        gc.collect()
        self._asked_to_park.clear()
        self._report("parked")
        order = self._resume.get()
        self.resumed_at = time.time()
        for name in PER_START:
            os.environ.pop(name, None)
        os.environ.update(order.environment)

    def _report(self, state: WorkerState) -> None:
        assert self._connection is not None
        self._connection.send(msgspec.json.encode(Report(state)))

    def _listen(self, connection: socket.socket) -> None:
        while data := _received(connection):
            order = msgspec.json.decode(data, type=Park | Resume)
            if isinstance(order, Resume):
                self._resume.put(order)
                continue
            with self._lock:
                if self._interrupt is None:
                    os._exit(ExitCode.FAULT)  # it was asked to park while it was not training
                self._asked_to_park.set()
                self._interrupt()


def _received(connection: socket.socket) -> bytes:
    """Return the next message; nothing if the supervisor has gone, also with something unread."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(_MESSAGE_BYTES)
    return b""
