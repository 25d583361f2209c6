"""Workers of a machine that start at once: forked from one that has imported torch and the trainer, and nothing more.

Importing takes seconds, longer still when all ranks of a machine do it together, and a restart would pay for it. The
nursery has a single thread and has never computed anything, so that a fork of it is as good as a new process. It dies
with its supervisor and takes the workers with it; stores that it opened live on.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import LaunchError
from keepwarm.trainer.distributed.in_process_restart import ORDERS, Begin, Halt, Said
from keepwarm.trainer.job.run_folder import RunFolder

FAILURE_GRACE_S = 10.0
"""How long the other workers may take to end by themselves once one has failed: they may be about to say the same."""
KILL_TIMEOUT_S = 30.0
"""How long a killed worker may take to die."""
PRELOADED = ("keepwarm.trainer.loop.session", "torch.utils.tensorboard")
WORKER_START_TIMEOUT_S = 300.0
"""Seconds that a start may take, the imports included: from a slow shared disk they take minutes."""
HALT = 2.0
"""Seconds that workers have to come to rest when others have died."""
_PR_SET_PDEATHSIG = 1
_MESSAGE = 1 << 18
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


def preload(modules: Sequence[str] = PRELOADED) -> None:
    """Import what workers need; `trainer` by name, as `launch` does not depend on torch elsewhere."""
    gc.disable()  # all of it stays: looking for garbage meanwhile takes a tenth of the time
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        gc.enable()
    gc.freeze()


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """`python -P -m MODULE ARGUMENTS` with these environment variables; output goes to `log`, or to this process's."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    module: str = "keepwarm.trainer"
    log: str | None = None
    stays: bool = False
    """It can be halted, and begin again in the same process; see `keepwarm.trainer.distributed.in_process_restart`."""


class StoreOrder(msgspec.Struct, frozen=True, kw_only=True):
    """`keepwarm.launch.node.store.serve` with these arguments."""

    folder: str
    number: int
    host: str
    node: str
    silence: float


class _Order(msgspec.Struct, frozen=True):
    worker: Worker | None = None
    store: StoreOrder | None = None
    end: tuple[int, int] | None = None
    """(pid, signal)"""
    halt: int | None = None
    again: tuple[int, dict[str, str]] | None = None
    """(pid, environment)"""


class _Answer(msgspec.Struct, frozen=True):
    started: int | None = None
    ended: tuple[int, int] | None = None
    """(pid, exit code, negative for a signal)"""
    said: tuple[int, str] | None = None
    """(pid, what `keepwarm.trainer.distributed.in_process_restart.Said` says)"""


class Nursery:
    """The side of who wants processes. Not thread-safe. Make it while this process has one thread.

    What is not imported in this process yet, the nursery imports by itself, with `environment`.
    """

    def __init__(self, modules: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._socket.close()
            os.environ.update(environment or {})
            Tender(theirs, parent).run(modules)
        theirs.close()
        self._know_nobody()

    def _know_nobody(self) -> None:
        self.ended: dict[int, int] = {}
        """Exit code by pid of the processes that have ended; negative for a signal."""
        self._said: dict[int, str] = {}
        """What workers that can be halted have said last, by pid."""

    def start(self, worker: Worker, resting: int | None = None) -> int:
        """Begin a worker, in the process `resting` if that one still lives, else in a new one; its pid."""
        if resting is None or resting in self.ended:
            return self._started(_Order(worker=worker))
        self._said.pop(resting, None)
        self._socket.send(msgspec.json.encode(_Order(again=(resting, worker.environment))))
        return resting

    def halt(self, pids: Sequence[int]) -> set[int]:
        """Have workers come to rest, to be started again; returns those that did within `HALT` seconds.

        The others have ended, are not training or take longer: they are to be killed.
        """
        self.poll()
        asked = {pid for pid in pids if self._said.get(pid) == "training"}
        for pid in asked:
            self._socket.send(msgspec.json.encode(_Order(halt=pid)))
        end = time.monotonic() + HALT
        while any(self._said.get(pid) == "training" for pid in asked) and time.monotonic() < end:
            self.poll(0.1)
        return {pid for pid in asked if self._said.get(pid) == "resting"}

    def open_store(self, order: StoreOrder) -> int:
        """Fork a store that lives on when this node dies; its pid."""
        return self._started(_Order(store=order))

    def send(self, pids: Sequence[int], number: signal.Signals) -> None:
        """Signal those that have not ended: the nursery knows, as it is their parent."""
        self.poll()
        for pid in pids:
            if pid not in self.ended:
                self._socket.send(msgspec.json.encode(_Order(end=(pid, int(number)))))

    def poll(self, seconds: float = 0.0) -> None:
        """Learn who has ended; waits at most `seconds` for news."""
        self._socket.settimeout(seconds)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while True:
                self._receive()
                self._socket.settimeout(0.0)

    def close(self) -> None:
        """End the nursery, which may still be importing, and its workers."""
        self._socket.close()
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _started(self, order: _Order) -> int:
        self._socket.settimeout(WORKER_START_TIMEOUT_S)
        try:
            self._socket.send(msgspec.json.encode(order))
            while (pid := self._receive()) is None:
                pass
        except TimeoutError:
            raise LaunchError(f"process {self.pid} has not started a worker in {WORKER_START_TIMEOUT_S:g} s") from None
        return pid

    def _receive(self) -> int | None:
        data = self._socket.recv(_MESSAGE)
        if not data:
            raise LaunchError(f"process {self.pid}, which starts the workers of this node, has died")
        answer = msgspec.json.decode(data, type=_Answer)
        if answer.ended is not None:
            self.ended[answer.ended[0]] = answer.ended[1]
            self._said.pop(answer.ended[0], None)
        if answer.said is not None:
            self._said[answer.said[0]] = answer.said[1]
        return answer.started


class Tender:
    """The nursery's own side, at the other end of its socket: forks, waits and tells."""

    def __init__(self, connection: socket.socket, parent: int) -> None:
        die_with(parent)
        # What the parent does when it ends, as removing folders and ending its processes, is not for its forks to do.
        atexit._clear()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
        for number in _HANDLED:
            signal.signal(number, signal.SIG_IGN if number != signal.SIGCHLD else signal.SIG_DFL)
        self._socket, self._me = connection, os.getpid()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ, self._ordered)
        self._lines: dict[int, socket.socket] = {}
        """To each process, by pid."""

    def run(self, modules: Sequence[str]) -> NoReturn:
        code = ExitCode.DONE
        try:
            preload(modules)
            while self._turn():
                pass
        except BaseException:
            traceback.print_exc()
            code = ExitCode.FAULT
        finally:
            os._exit(code)

    def _turn(self) -> bool:
        return all(key.data() for key, _ in self._selector.select())

    def _ordered(self) -> bool:
        """Do what the other side wants; False when it has gone."""
        if data := self._socket.recv(_MESSAGE):
            self._obey(msgspec.json.decode(data, type=_Order))
        return bool(data)

    def _obey(self, order: _Order) -> None:
        if order.end is not None:
            # It may have ended, but it has not been waited for: the pid is still its own.
            with contextlib.suppress(ProcessLookupError):
                os.kill(*order.end)
        elif order.halt is not None:
            self._tell(order.halt, Halt())
        elif order.again is not None:
            self._tell(order.again[0], Begin(order.again[1]))
        else:
            self._fork(order)

    def _tell(self, pid: int, message: Halt | Begin) -> None:
        if pid in self._lines:
            with contextlib.suppress(ConnectionError):
                self._lines[pid].send(msgspec.json.encode(message))

    def _fork(self, order: _Order) -> None:
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        action = self._store(order.store, theirs) if order.store is not None else self._worker(order.worker, theirs)
        pid = os.fork()
        if not pid:
            self._selector.close()
            for mine in (self._socket, line, *self._lines.values()):
                mine.close()
            _become(action)
        theirs.close()
        self._lines[pid] = line
        self._selector.register(line, selectors.EVENT_READ, partial(self._heard, pid))
        descriptor = os.pidfd_open(pid)
        self._selector.register(descriptor, selectors.EVENT_READ, partial(self._buried, descriptor, pid))
        self._answer(_Answer(started=pid))

    def _answer(self, answer: _Answer) -> None:
        self._socket.send(msgspec.json.encode(answer))

    def _worker(self, worker: Worker | None, line: socket.socket) -> Callable[[], None]:
        assert worker is not None

        def train() -> None:
            die_with(self._me)
            _redirect(worker.log)
            os.environ.update(worker.environment)
            if worker.stays:
                os.environ[ORDERS] = str(line.detach())
            else:
                line.close()
            sys.argv = [worker.module, *worker.arguments]
            runpy.run_module(worker.module, run_name="__main__", alter_sys=True)

        return train

    @staticmethod
    def _store(order: StoreOrder, line: socket.socket) -> Callable[[], None]:
        def serve() -> None:
            line.close()
            _redirect(str(RunFolder(Path(order.folder)).nodes / f"store-{order.number}.log"))
            importlib.import_module("keepwarm.launch.node.store").serve(order)

        return serve

    def _heard(self, pid: int) -> bool:
        line = self._lines.get(pid)
        if line is None:
            return True  # it was buried a moment ago, in the same turn
        data = b""
        with contextlib.suppress(ConnectionError):
            data = line.recv(_MESSAGE)
        if data:
            self._answer(_Answer(said=(pid, msgspec.json.decode(data, type=Said).state)))
        else:
            self._selector.unregister(line)  # it is about to end
        return True

    def _buried(self, descriptor: int, pid: int) -> bool:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        if (line := self._lines.pop(pid, None)) is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(line)
            line.close()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._answer(_Answer(ended=(pid, code)))
        return True


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(ExitCode.FAULT)


def _become(action: Callable[[], None]) -> NoReturn:
    """Be a process of its own from here on, and end as a new interpreter would."""
    code: int = ExitCode.FAULT
    try:
        os.setsid()
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # By line, so that a killed worker has said everything; errors as a new interpreter has them.
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        action()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(log: str | None) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
