"""One node's link to the store: find it or open the next one, send heartbeats, read and change the table.

A supervisor that cannot reach the newest store must stop its workers: every method then raises `StoreLost`.
"""

import queue
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
from keepwarm.launch.node import shared_table
from keepwarm.launch.node.heartbeat import Heartbeat
from keepwarm.launch.node.record import EndRecord, StoreRecord
from keepwarm.launch.node.slot_table import Table
from keepwarm.trainer.job.run_folder import RunFolder

OPENING_TIMEOUT_S = 60.0
"""How long the supervisor that claimed the next store may take to open it."""
SEARCH_TIMEOUT_S = 300.0
"""How long a node looks for a store that it can reach."""
FIRST_GRACE_S = 60.0
"""How long spares leave vacant slots of the first start to the nodes meant for them."""
NEXT_GRACE_S = 3.0
"""The same under a later store: owners have noticed together that the previous one is lost."""
STORE_POLL_INTERVAL_S = 0.05
T = TypeVar("T")


class StoreLost(LaunchError):
    """The store has died, does not answer, or was replaced."""

    exit_code = ExitCode.UNRECOVERABLE


class RunEnded(LaunchError):
    """The run has ended under a store that this node cannot reach."""

    def __init__(self, end: EndRecord) -> None:
        super().__init__(end.reason)
        self.exit_code = end.code


class Membership:
    """Link to the newest store. `change` and `read` may be called from any thread."""

    def __init__(
        self, folder: Path, node: str, first: Table, *, peer_timeout: float, open_store: Callable[[int], None]
    ) -> None:
        """Create an unconnected link.

        Args:
            folder: of the run.
            node: name of this node.
            first: the table of a store that has none yet.
            peer_timeout: seconds without an answer after which the store counts as lost.
            open_store: opens the n-th store of the run on this node; if that fails, another node opens the next one.
        """
        self.folder, self.node, self._peer_timeout = folder, node, peer_timeout
        self._first = first
        self._open_store = open_store
        self.record: StoreRecord | None = None
        self._client: TCPStore | None = None
        self._heartbeat: Heartbeat | None = None
        self._queries: _Queries | None = None
        self._entered = 0.0
        self._first_store: int | None = None
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Connect to the newest store, or open the next one if it cannot be reached.

        Raises:
            RunEnded: the run ended under a store that other nodes could reach.
            StoreLost: no store could be reached for `SEARCH_TIMEOUT_S`.
        """
        self.leave(farewell=False)
        unreachable: set[int] = set()
        began = time.monotonic()
        claimed_at = began, node_record.newest_claim(self.folder)
        while time.monotonic() < began + SEARCH_TIMEOUT_S:
            self.check_end()
            record, claim = node_record.newest_store(self.folder), node_record.newest_claim(self.folder)
            if claim != claimed_at[1]:
                claimed_at = time.monotonic(), claim
            if record is not None and record.number == claim and claim not in unreachable:
                if self._reach(record):
                    return
                unreachable.add(claim)
            opening = claim >= 0 and (record is None or record.number < claim)
            if opening and time.monotonic() < claimed_at[0] + OPENING_TIMEOUT_S:
                time.sleep(STORE_POLL_INTERVAL_S)
            elif node_record.claim_store(self.folder, claim + 1):
                self._open_store(claim + 1)
        raise StoreLost(f"{self.node} found no store of {self.folder} that it can reach in {SEARCH_TIMEOUT_S:g} s")

    def _reach(self, record: StoreRecord) -> bool:
        try:
            self._heartbeat = Heartbeat(record, self.node, self._peer_timeout, self.folder)
            self._client = TCPStore(
                record.host, record.port, is_master=False, wait_for_workers=False,
                timeout=timedelta(seconds=max(5.0, self._peer_timeout)),
            )  # fmt: skip
        except (OSError, DistError):
            self.leave(farewell=False)
            return False
        self.record, self._entered, self._queries = record, time.monotonic(), _Queries()
        if self._first_store is None:
            self._first_store = record.number
        return True

    def check_end(self) -> None:
        """Raise `RunEnded` if nodes under another store have ended the run since this node first had a store."""
        end = node_record.read_end(self.folder)
        if end is not None and self._first_store is not None and end.number >= self._first_store:
            raise RunEnded(end)

    def record_end(self, code: int, reason: str) -> None:
        """Record the end of the run under this node's store, for nodes that cannot reach it."""
        assert self.record is not None
        node_record.write_end(self.folder, EndRecord(number=self.record.number, code=code, reason=reason))

    @property
    def store(self) -> TCPStore:
        if self._client is None:
            raise StoreLost("not connected to a store")
        return self._client

    def may_fill(self, *, begun: bool) -> bool:
        """Return whether the owners of vacant slots, intended or remembered, have had time to join.

        Under the first store this is the case once workers have `begun`.
        """
        assert self.record is not None
        if begun and self.record.number == 0:
            return True
        grace = FIRST_GRACE_S if self.record.number == 0 else NEXT_GRACE_S
        return time.monotonic() - self._entered > grace

    def change(self, step: Callable[[Table], Table]) -> tuple[Table, bool]:
        """Change the table; return (the table afterwards, whether this changed it)."""
        return self._ask(lambda client: shared_table.change(client, self._first, step))

    def read(self) -> Table:
        return self._ask(shared_table.read) or self._first

    def mark_active(self) -> None:
        """Mark that workers are started under this store: nodes still under an earlier one must stop theirs."""
        assert self.record is not None
        if self.record.number:
            (RunFolder(self.folder).nodes / f"store-{self.record.number}.active").touch()

    def leave(self, *, farewell: bool) -> None:
        """Disconnect; without a farewell the store considers this node dead."""
        if self._heartbeat is not None:
            self._heartbeat.close(farewell=farewell)
        if self._queries is not None:
            self._queries.close()
        self._heartbeat = self._client = self._queries = None

    def _ask(self, question: Callable[[TCPStore], T]) -> T:
        """Return the store's answer; wait only while the store is known alive, which torch's client does not check."""
        with self._lock:
            heartbeat, queries, client = self._heartbeat, self._queries, self._client
            if heartbeat is None or queries is None or client is None:
                raise StoreLost(f"{self.node}: not connected to a store")
            answer = queries.ask(lambda: question(client))
            while not heartbeat.lost:
                try:
                    return answer.result(STORE_POLL_INTERVAL_S)
                except TimeoutError:
                    continue
                except DistError as error:
                    raise StoreLost(f"{self.node}: the store does not answer: {error}") from error
            raise StoreLost(f"{self.node}: {heartbeat.lost}")


class _Queries:
    """Runs queries one after the other on a thread of its own, which is abandoned if one is never answered.

    Torch's client waits for answers without a deadline: for a quarter of an hour if the network drops every packet.
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
        """End the thread after the queries asked so far."""
        self._questions.put(None)

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            question()
