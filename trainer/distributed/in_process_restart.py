"""In-process restart: a worker whose peers have died stays, and begins the next start in the same process.

It has imported, allocated and cached what a new process pays for until the end of its first step. Its supervisor asks
it to halt; collectives that wait for the dead, or for others that do, then fail (`World.interrupt`). It leaves its
agent, forgets its engine and its process groups, says that it rests, and waits for what the next start is told. A
worker that is not training, or does not come to rest in time, ends: a new process always works.
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
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.monitor.goodput import process_start

ORDERS = "KEEPWARM_ORDERS"
"""Environment variable: the descriptor of the socket on which a supervisor speaks to its worker."""
EPOCH = "KEEPWARM_EPOCH"
"""Environment variable of rank 0: what this epoch restores, a supervisor has had the agents decide already."""
RECOVERY = "KEEPWARM_RECOVERY"
"""Environment variable of rank 0: what the supervisors know of the recovery that this start is part of, as JSON."""
PER_START = (EPOCH, RECOVERY)
"""What one start is told, and the next one need not be."""
HALT_TIMEOUT_S = 5.0
"""Seconds that a worker whose collective has failed waits to hear that the fault is elsewhere, before it gives up."""
_MESSAGE = 1 << 18


def may_stay(job: JobSpec) -> bool:
    """Whether workers of a job may begin again in their process; whether they have a GPU they know themselves."""
    return job.cluster.in_process != "off" and engine_info(job.parallel).in_process


class Halt(msgspec.Struct, frozen=True, tag=True):
    """To a worker that trains: come to rest."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """To a worker that rests: start again with these environment variables."""

    environment: dict[str, str]


class Said(msgspec.Struct, frozen=True):
    """From a worker: it trains, and can be halted from now on; or it rests."""

    state: Literal["training", "resting"]


class Halted(Exception):
    """This start is over, and the process goes on to the next one."""


class Orders:
    """A worker's end of the socket. A worker that no supervisor speaks to is never halted."""

    def __init__(self, connection: socket.socket | None) -> None:
        self.began = process_start()
        """When this start began, in seconds since 1970."""
        self._connection = connection
        self._lock = threading.Lock()
        self._interrupt: Callable[[], None] | None = None
        self._halted = threading.Event()
        self._begin: queue.SimpleQueue[Begin] = queue.SimpleQueue()
        if connection is not None:
            threading.Thread(target=self._listen, args=(connection,), name="orders", daemon=True).start()

    @classmethod
    def inherited(cls) -> "Orders":
        """Those of the process that has started this one."""
        descriptor = os.environ.pop(ORDERS, None)
        return cls(None if descriptor is None else socket.socket(fileno=int(descriptor)))

    @contextlib.contextmanager
    def training(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """While it lasts, this worker can be halted; `interrupt` is called, on another thread, to end its waiting.

        Raises:
            Halted: in place of whatever it was that the interruption made fail.
        """
        if self._connection is None:
            yield
            return
        with self._lock:
            self._interrupt = interrupt
        self._say("training")
        try:
            yield
        except Exception as error:
            # A collective fails when its peer dies, often before the supervisors know.
            if self._halted.wait(HALT_TIMEOUT_S if isinstance(error, RuntimeError) else 0.0):
                raise Halted((str(error).strip() or type(error).__name__).splitlines()[0]) from error
            raise
        finally:
            with self._lock:
                self._interrupt = None
        if self._halted.is_set():
            raise Halted("between two steps")

    def next_start(self) -> None:
        """Come to rest, and return when the next start shall begin, told by environment variables as every one."""
        assert self._connection is not None
        gc.collect()
        self._halted.clear()
        self._say("resting")
        begin = self._begin.get()
        self.began = time.time()
        for name in PER_START:
            os.environ.pop(name, None)
        os.environ.update(begin.environment)

    def _say(self, state: Literal["training", "resting"]) -> None:
        assert self._connection is not None
        self._connection.send(msgspec.json.encode(Said(state)))

    def _listen(self, connection: socket.socket) -> None:
        while data := connection.recv(_MESSAGE):
            order = msgspec.json.decode(data, type=Halt | Begin)
            if isinstance(order, Begin):
                self._begin.put(order)
                continue
            with self._lock:
                if self._interrupt is None:
                    os._exit(ExitCode.FAULT)  # it was to halt and cannot stay
                self._halted.set()
                self._interrupt()
