"""Fork server. Starts workers by forking a single-threaded process that has already imported torch and the trainer.

Importing takes seconds, longer still when all ranks of a machine do it at once, and every restart would pay for it.
The server has one thread and has computed nothing, so a fork of it is as good as a new interpreter. It dies with the
process that started it and takes the workers with it; detached workers live on.
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
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NoReturn

import msgspec

from keepwarm import signals
from keepwarm.exit_code import ExitCode
from keepwarm.files import READABLE, let_go_of_locks, within
from keepwarm.launch.errors import LaunchError
from keepwarm.side_writer import protect_streams
from keepwarm.trainer.distributed.in_process_restart import CONTROL, Park, Report, Resume, WorkerState

PRELOADED = ("keepwarm.trainer.loop.session", "torch.utils.tensorboard")
WORKER_START_TIMEOUT_S = 300.0
"""How long a start may take, imports included: from a slow shared disk they take minutes."""
LOG_PATIENCE_S = 2.0
"""How long a new worker waits for the storage of its log."""
PARK_TIMEOUT_S = 2.0
"""How long workers may take to park after others have died."""
_PR_SET_PDEATHSIG = 1
_MESSAGE_BYTES = 1 << 18
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
_LEFT_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that workers ignore if this process does. Not SIGTERM: with it launchers ask ranks to save and end."""


def preload(modules: Sequence[str] = PRELOADED) -> None:
    """Import what workers need. By name, since `launch` does not depend on torch elsewhere."""
    gc.disable()  # nothing of it is garbage, and looking for some takes a tenth of the time
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        gc.enable()
    gc.freeze()


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """Describe a process that runs `python -P -m MODULE ARGUMENTS` with these environment variables."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    module: str = "keepwarm.trainer"
    log: str | None = None
    """File to which output is appended; None: the output of this process."""
    reusable: bool = False
    """It can be parked and resumed; see `keepwarm.trainer.distributed.in_process_restart`."""
    detached: bool = False
    """It outlives the fork server and the process that started it."""


class _Start(msgspec.Struct, frozen=True, tag=True):
    worker: Worker


class _Signal(msgspec.Struct, frozen=True, tag=True):
    pid: int
    number: int


class _Forward(msgspec.Struct, frozen=True, tag=True):
    """Pass a message on to a reusable worker."""

    pid: int
    message: Park | Resume


_Order = _Start | _Signal | _Forward


class _Started(msgspec.Struct, frozen=True, tag=True):
    pid: int


class _Ended(msgspec.Struct, frozen=True, tag=True):
    pid: int
    code: int
    """Negative for a signal."""


class _Reported(msgspec.Struct, frozen=True, tag=True):
    pid: int
    state: WorkerState


_Notice = _Started | _Ended | _Reported


class ForkServer:
    """Client side. Not thread-safe. Create it while this process has one thread.

    The server imports `modules` that this process has not imported yet, with `environment` set.
    """

    def __init__(self, modules: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self.ended: dict[int, int] = {}
        """Exit code by pid of the processes that have ended; negative for a signal."""
        self._states: dict[int, WorkerState] = {}
        """Last state that each reusable worker reported, by pid."""
        self._socket, self.pid = self._launch(modules, environment or {})

    def _launch(self, modules: Sequence[str], environment: Mapping[str, str]) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with signals.held(_HANDLED):
            pid = os.fork()
            if not pid:
                ours.close()
                os.environ.update(environment)
                ForkServerProcess(theirs, parent).run(modules)
        theirs.close()
        return ours, pid

    def start(self, worker: Worker, parked: int | None = None) -> int:
        """Start a worker and return its pid: resume the process `parked` if it still lives, else fork a new one."""
        if parked is None or parked in self.ended:
            return self._fork(worker)
        self._states.pop(parked, None)
        self._send(_Forward(parked, Resume(worker.environment)))
        return parked

    def park(self, pids: Sequence[int]) -> set[int]:
        """Ask workers to park, and return those that did within `PARK_TIMEOUT_S`.

        The others have ended, are not training or are too slow: kill them.
        """
        self.poll()
        asked = {pid for pid in pids if self._states.get(pid) == "training"}
        for pid in asked:
            self._send(_Forward(pid, Park()))
        end = time.monotonic() + PARK_TIMEOUT_S
        while any(self._states.get(pid) == "training" for pid in asked) and time.monotonic() < end:
            self.poll(0.1)
        return {pid for pid in asked if self._states.get(pid) == "parked"}

    def send(self, pids: Sequence[int], number: signal.Signals) -> None:
        """Signal the processes that have not ended. The server knows which, since it is their parent."""
        self.poll()
        for pid in pids:
            if pid not in self.ended:
                self._send(_Signal(pid, int(number)))

    def poll(self, seconds: float = 0.0) -> None:
        """Update `ended`; wait at most `seconds` for the first notice."""
        self._socket.settimeout(seconds)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while True:
                self._receive()
                self._socket.settimeout(0.0)

    def close(self) -> None:
        """Kill the server, which may still be importing, and with it all workers that are not detached."""
        self._socket.close()
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _fork(self, worker: Worker) -> int:
        self._socket.settimeout(WORKER_START_TIMEOUT_S)
        try:
            self._send(_Start(worker))
            while (pid := self._receive()) is None:
                pass
        except TimeoutError:
            raise LaunchError(f"process {self.pid} started no worker within {WORKER_START_TIMEOUT_S:g} s") from None
        return pid

    def _send(self, order: _Order) -> None:
        try:
            self._socket.send(msgspec.json.encode(order))
        except ConnectionError as error:
            raise self._died() from error

    def _died(self) -> LaunchError:
        return LaunchError(f"the fork server of this node (process {self.pid}) has died")

    def _receive(self) -> int | None:
        """Take in one notice; return the pid if a worker was started."""
        data = b""
        with contextlib.suppress(ConnectionError):
            data = self._socket.recv(_MESSAGE_BYTES)
        if not data:
            raise self._died()
        notice = msgspec.json.decode(data, type=_Notice)
        if isinstance(notice, _Started):
            self.ended.pop(notice.pid, None)  # of an earlier worker: pids are used again
            return notice.pid
        if isinstance(notice, _Ended):
            self.ended[notice.pid] = notice.code
            self._states.pop(notice.pid, None)
        else:
            self._states[notice.pid] = notice.state
        return None


class ForkServerProcess:
    """Server side, at the other end of the socket: forks workers, reaps them and reports."""

    def __init__(self, connection: socket.socket, parent: int) -> None:
        die_with(parent)
        # Exit handlers of the parent, which remove its folders and end its processes, must not run in its forks.
        atexit._clear()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
        self._ignored = signals.ignored(_LEFT_IGNORED)
        for number in _HANDLED:
            signal.signal(number, signal.SIG_IGN if number != signal.SIGCHLD else signal.SIG_DFL)
        signals.release(_HANDLED)
        self._socket, self._pid = connection, os.getpid()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ, self._on_order)
        self._channels: dict[int, socket.socket] = {}
        """Control channel of each process, by pid."""

    def run(self, modules: Sequence[str]) -> NoReturn:
        """Serve until the client has gone."""
        code = ExitCode.DONE
        try:
            preload(modules)
            while self._serve_once():
                pass
        except ConnectionError:
            pass  # the client has gone, with something unread
        except BaseException:
            traceback.print_exc()
            code = ExitCode.FAULT
        finally:
            os._exit(code)

    def _serve_once(self) -> bool:
        return all(key.data() for key, _ in self._selector.select())

    def _on_order(self) -> bool:
        """Carry out the client's next order; return False when the client has gone."""
        data = self._socket.recv(_MESSAGE_BYTES)
        if not data:
            return False
        order = msgspec.json.decode(data, type=_Order)
        if isinstance(order, _Start):
            self._fork(order.worker)
        elif isinstance(order, _Signal):
            # It may have ended, but it has not been reaped: the pid still belongs to it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(order.pid, order.number)
        elif order.pid in self._channels:
            with contextlib.suppress(ConnectionError):
                self._channels[order.pid].send(msgspec.json.encode(order.message))
        return True

    def _fork(self, worker: Worker) -> None:
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with signals.held(_HANDLED):
            pid = os.fork()
            if not pid:
                self._selector.close()
                for inherited in (self._socket, channel, *self._channels.values()):
                    inherited.close()
                _run_child(worker, theirs, self._pid, self._ignored)
        theirs.close()
        self._channels[pid] = channel
        self._selector.register(channel, selectors.EVENT_READ, partial(self._on_report, pid))
        descriptor = os.pidfd_open(pid)
        self._selector.register(descriptor, selectors.EVENT_READ, partial(self._reaped, descriptor, pid))
        self._notify(_Started(pid))

    def _notify(self, notice: _Notice) -> None:
        self._socket.send(msgspec.json.encode(notice))

    def _on_report(self, pid: int) -> bool:
        channel = self._channels.get(pid)
        if channel is None:
            return True  # it was reaped a moment ago, in the same iteration
        data = b""
        with contextlib.suppress(ConnectionError):
            data = channel.recv(_MESSAGE_BYTES)
        if data:
            self._notify(_Reported(pid, msgspec.json.decode(data, type=Report).state))
        else:
            self._selector.unregister(channel)  # it cannot be parked, or is about to end
        return True

    def _reaped(self, descriptor: int, pid: int) -> bool:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        if (channel := self._channels.pop(pid, None)) is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(channel)
            channel.close()
        _, status = os.waitpid(pid, 0)
        self._notify(_Ended(pid, os.waitstatus_to_exitcode(status)))
        return True


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(ExitCode.FAULT)


def _run_child(worker: Worker, channel: socket.socket, server: int, ignored: frozenset[signal.Signals]) -> NoReturn:
    """Run a worker in this fork, in a session of its own, and end as a new interpreter would."""
    code: int = ExitCode.FAULT
    try:
        os.setsid()
        for number in set(_HANDLED) - ignored:
            signal.signal(number, signal.SIG_DFL)
        if signal.SIGINT not in ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a worker that trains handles it: see `Interrupt`
        signals.release(_HANDLED)
        # Line-buffered, so that nothing is lost when it is killed; errors as a new interpreter has them.
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        protect_streams(patient=not worker.detached)
        _run_module(worker, channel, server)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED  # before the module handles it, it has nothing to save
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run_module(worker: Worker, channel: socket.socket, server: int) -> None:
    if worker.detached:
        let_go_of_locks()
    else:
        die_with(server)
    _redirect(worker.log)
    os.environ.update(worker.environment)
    if worker.reusable:
        os.environ[CONTROL] = str(channel.detach())
    else:
        channel.close()
    sys.argv = [worker.module, *worker.arguments]
    runpy.run_module(worker.module, run_name="__main__", alter_sys=True)


def _redirect(log: str | None) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if log is None:
        return
    problem = "does not answer"

    def opened() -> int | None:
        nonlocal problem
        try:
            return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, READABLE)
        except OSError as error:
            problem = error.strerror or str(error)
            return None

    output = within(opened, LOG_PATIENCE_S)
    if output is None:
        print(f"keepwarm: {log}: {problem}; only errors of this process are shown, here", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    os.dup2(output, 1)
    os.dup2(output, 2)
