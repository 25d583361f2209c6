"""One node's link to the present store: finds it or opens the next one, shows that it lives, reads and changes the
table.

Whoever cannot reach the present store must stop its workers: every method then raises `StoreLost`.
"""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.node import record as node_record
from keepwarm.launch.node import store
from keepwarm.launch.node.record import EndRecord, StoreRecord
from keepwarm.launch.node.slot_table import Table
from keepwarm.trainer.job.run_folder import RunFolder

OPENING = 60.0
"""Seconds that whoever claimed the next store has to open it."""
GIVE_UP = 300.0
"""Seconds that a node looks for a store that it can reach."""
FIRST_GRACE = 60.0
"""Seconds that spares leave the slots of the first round to the nodes that were meant for them."""
NEXT_GRACE = 3.0
"""The same under a later store: who owned a slot has noticed with the others that the one before is lost."""
STORE_POLL_INTERVAL_S = 0.05
T = TypeVar("T")


class StoreLost(LaunchError):
    """The store has died, is silent, or another one has taken its place."""

    exit_code = ExitCode.UNRECOVERABLE


class RunEnded(LaunchError):
    """The run has ended under a store that this node could not reach."""

    def __init__(self, end: EndRecord) -> None:
        super().__init__(end.reason)
        self.exit_code = end.code


class Membership:
    """The present store as this node sees it. `change` and `read` may be called from any thread."""

    def __init__(
        self, folder: Path, node: str, first: Table, *, silence: float, open_store: Callable[[int], None]
    ) -> None:
        """`open_store(n)` opens the n-th store of the run on this node; it may fail, others then open another.

        `first`: the table of a store that has none yet.
        """
        self.folder, self.node, self.silence = folder, node, silence
        self._first = first
        self._open_store = open_store
        self.record: StoreRecord | None = None
        self._client: TCPStore | None = None
        self._beats: _Beats | None = None
        self._line: _Line | None = None
        self._entered = 0.0
        self._first_store: int | None = None
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Reach the present store, or open the next one when it cannot be reached.

        Raises:
            RunEnded: meanwhile, for the nodes that could.
            StoreLost: none could be reached for `GIVE_UP` seconds.
        """
        self.leave(politely=False)
        unreachable: set[int] = set()
        began = time.monotonic()
        claimed_at = began, node_record.newest_claim(self.folder)
        while time.monotonic() < began + GIVE_UP:
            self.check_end()
            record, claim = node_record.newest_store(self.folder), node_record.newest_claim(self.folder)
            if claim != claimed_at[1]:
                claimed_at = time.monotonic(), claim
            if record is not None and record.number == claim and claim not in unreachable:
                if self._reach(record):
                    return
                unreachable.add(claim)
            opening = claim >= 0 and (record is None or record.number < claim)
            if opening and time.monotonic() < claimed_at[0] + OPENING:
                time.sleep(STORE_POLL_INTERVAL_S)
            elif node_record.claim_store(self.folder, claim + 1):
                self._open_store(claim + 1)
        raise StoreLost(f"{self.node} waited {GIVE_UP:g} s for a store of the run in {self.folder} that it can reach")

    def _reach(self, record: StoreRecord) -> bool:
        try:
            self._beats = _Beats(record, self.node, self.silence, self.folder)
            self._client = TCPStore(
                record.host, record.port, is_master=False, wait_for_workers=False,
                timeout=timedelta(seconds=max(5.0, self.silence)),
            )  # fmt: skip
        except (OSError, DistError):
            self.leave(politely=False)
            return False
        self.record, self._entered, self._line = record, time.monotonic(), _Line()
        if self._first_store is None:
            self._first_store = record.number
        return True

    def check_end(self) -> None:
        """Raise `RunEnded` when the nodes of another store have done the job since this node first had one."""
        end = node_record.read_end(self.folder)
        if end is not None and self._first_store is not None and end.number >= self._first_store:
            raise RunEnded(end)

    def say_end(self, code: int, reason: str) -> None:
        """The job was done, or ended for good, by workers of this node, under its store."""
        assert self.record is not None
        node_record.write_end(self.folder, EndRecord(number=self.record.number, code=code, reason=reason))

    @property
    def store(self) -> TCPStore:
        if self._client is None:
            raise StoreLost("not connected to a store")
        return self._client

    def may_fill(self, *, begun: bool) -> bool:
        """Whether those who were meant for the slots, or remember to own them, have had time to come.

        Under the first store that is so once workers have `begun`.
        """
        assert self.record is not None
        if begun and self.record.number == 0:
            return True
        grace = FIRST_GRACE if self.record.number == 0 else NEXT_GRACE
        return time.monotonic() - self._entered > grace

    def change(self, step: Callable[[Table], Table]) -> tuple[Table, bool]:
        """Change the table; (the table as it is then, whether this changed it)."""
        return self._ask(lambda client: store.change(client, self._first, step))

    def read(self) -> Table:
        return self._ask(store.read) or self._first

    def say_active(self) -> None:
        """Workers are started under this store: those who are still with an earlier one must stop theirs."""
        assert self.record is not None
        if self.record.number:
            (RunFolder(self.folder).nodes / f"store-{self.record.number}.active").touch()

    def leave(self, *, politely: bool) -> None:
        """Say farewell, so that the store does not take this node for dead; or be gone."""
        if self._beats is not None:
            self._beats.close(politely=politely)
        if self._line is not None:
            self._line.close()
        self._beats = self._client = self._line = None

    def _ask(self, question: Callable[[TCPStore], T]) -> T:
        """What the store answers; no longer than the store is known to live, which torch's client does not see to."""
        with self._lock:
            beats, line, client = self._beats, self._line, self._client
            if beats is None or line is None or client is None:
                raise StoreLost(f"{self.node}: not connected to a store")
            answer = line.ask(lambda: question(client))
            while not beats.lost:
                try:
                    return answer.result(STORE_POLL_INTERVAL_S)
                except TimeoutError:
                    continue
                except DistError as error:
                    raise StoreLost(f"{self.node}: the store does not answer: {error}") from error
            raise StoreLost(f"{self.node}: {beats.lost}")


class _Line:
    """Asks one question after the other on a thread of its own, which stays behind with one that is never answered.

    Torch's client waits for an answer without a deadline; where the network swallows everything, for a quarter of an
    hour.
    """

    def __init__(self) -> None:
        self._questions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="store", daemon=True).start()

    def ask(self, question: Callable[[], T]) -> "Future[T]":
        answer: Future[T] = Future()

        def put() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        self._questions.put(put)
        return answer

    def close(self) -> None:
        """The thread ends after what was asked."""
        self._questions.put(None)

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            question()


class _Beats:
    """Shows that this node lives, on a thread of its own, and notices when the store does not."""

    def __init__(self, record: StoreRecord, node: str, silence: float, folder: Path) -> None:
        """Connects; returns once the store has answered. Raises `OSError`."""
        self.lost = ""
        self._record, self._silence, self._folder = record, silence, folder
        self._every = min(0.2, silence / 5)
        self._stop = threading.Event()
        self._connection = socket.create_connection((record.host, record.desk), timeout=silence)
        try:
            self._connection.sendall(node.encode() + b"\n")
            if not self._connection.recv(16):
                raise ConnectionResetError("the store closed the connection")
        except OSError:
            self._connection.close()
            raise
        self._thread = threading.Thread(target=self._run, name="signs-of-life", daemon=True)
        self._thread.start()

    def close(self, *, politely: bool) -> None:
        self._stop.set()
        if politely:
            with contextlib.suppress(OSError):
                self._connection.sendall(store.FAREWELL)
        self._thread.join(self._silence + 1)
        self._connection.close()

    def _run(self) -> None:
        heard = looked = time.monotonic()
        self._connection.settimeout(self._every)
        while not self._stop.wait(self._every) and not self.lost:
            before = time.monotonic()
            try:
                self._connection.send(store.BEAT)
                if not self._connection.recv(64):
                    raise ConnectionResetError("closed")
                heard = time.monotonic()
            except TimeoutError:
                # Counted from when this thread could have heard something: it may have been frozen itself.
                heard = max(heard, before - self._silence / 2) if before - heard > 2 * self._silence else heard
                if time.monotonic() - heard > self._silence:
                    self.lost = f"waited {self._silence:g} s for store {self._record.number} to answer"
            except OSError as error:
                self.lost = f"the connection to store {self._record.number} was lost: {error}"
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                self._look_for_another()

    def _look_for_another(self) -> None:
        """A later store counts once it can be reached, or once workers have been started under it."""
        newest = node_record.newest_store(self._folder)
        if newest is None or newest.number <= self._record.number:
            return
        active = (RunFolder(self._folder).nodes / f"store-{newest.number}.active").exists()
        with contextlib.suppress(OSError):
            socket.create_connection((newest.host, newest.desk), timeout=self._silence).close()
            active = True
        if active:
            self.lost = f"store {newest.number} has taken the place of store {self._record.number}"
