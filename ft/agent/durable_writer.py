"""Write committed snapshots as durable checkpoints while the workers keep training.

Each agent writes its own workers' parts. The lowest live slot waits for all parts, writes the manifest, verifies and
publishes. A failing, full or slow disk costs only a warning and a later checkpoint.
"""

import contextlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.discovery.config import DurableConfig
from keepwarm.ft.errors import DurableError, FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import Contents, contents_length, decode_contents
from keepwarm.ft.format.writer import write_part
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import SnapshotId


@dataclass
class Report:
    """Outcome of the checkpoints written since this agent started."""

    written: int = 0
    published: int = 0
    failed: int = 0
    last_step: int = -1
    last_seconds: float = 0.0
    last_error: str = ""


class DurableWriter:
    """Writes one checkpoint at a time on a dedicated thread."""

    def __init__(self, shell: Shell, config: DurableConfig) -> None:
        self._shell, self._config = shell, config
        self._root = Path(config.root)
        self._pool = ThreadPoolExecutor(1, "durable")
        self._under_way = 0
        self._owed = False
        self._saves: int | None = None
        """The epoch that a supervisor has asked to have on disk."""
        self._abandoned = threading.Event()
        """Set to abandon the most recently started checkpoint."""
        self.report = Report()

    @property
    def busy(self) -> bool:
        return self._under_way > 0

    def committed(self, snapshot: SnapshotId) -> None:
        """Start writing a snapshot if it is due. Skip it if another one is being written."""
        due = snapshot.step % self._config.every == 0 or self._owed
        if not due or self.busy:
            self._owed = self._owed or due
            return
        self._begin(snapshot, snapshot.epoch)

    def save(self, epoch: int) -> None:
        """Write the snapshot that an epoch restores, due or not, as soon as this agent has all of its part."""
        self._saves = epoch
        self.decided()

    def decided(self) -> None:
        """React to an epoch's decision coming into force."""
        state = self._shell.state
        if self._saves is None or not state.restorable or state.epoch < self._saves:
            return
        asked, self._saves = self._saves, None
        if state.decided is not None:
            self.abandon()  # the write in progress may be waiting for a lost agent
            self._begin(state.decided, asked)

    def _begin(self, snapshot: SnapshotId, epoch: int) -> None:
        """Start writing for `epoch`: the snapshot's, or a later one that a supervisor wants on disk.

        All writers share one folder.
        """
        copy = self._shell.state.copy(snapshot)
        if copy is None or copy.data is None:
            return
        self._under_way, self._owed = self._under_way + 1, False
        self._abandoned = threading.Event()
        shell = self._shell
        shell.dispatch(events.DurableStarted(snapshot))
        data = shell.memory.data[copy.data].data
        tmp = publication.staging(self._root, epoch, snapshot.step)
        first = min([shell.config.slot, *shell.network.links]) == shell.config.slot
        shell.pool.follow(
            self._pool.submit(self._write, snapshot, tmp, data, self._abandoned if first else None),
            lambda error: self._written(snapshot, error),
        )

    def abandon(self) -> None:
        """Stop waiting for missing parts: the agents that should have written them are gone."""
        self._abandoned.set()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _written(self, snapshot: SnapshotId, error: str) -> None:
        self._under_way -= 1
        if error:
            self._owed = True
            self.report.failed += 1
            self.report.last_error = error
            self._shell.journal.write(
                "warning", "a checkpoint failed, the next is tried", step=snapshot.step, reason=error
            )
        else:
            self.report.written += 1
            self.report.last_step = snapshot.step
        self._shell.dispatch(events.DurableEnded(snapshot))

    def _write(self, snapshot: SnapshotId, tmp: Path, data: Bytes, publishes: threading.Event | None) -> str:
        """Write on the thread; publish if `publishes` is given and not set. Return the error message, or ""."""
        began = self._shell.clock()
        try:
            tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = parts(data)
            for contents, part in found:
                tensors = [(piece, part[start : start + piece.bytes]) for piece, start in contents.entries]
                meta = {"keepwarm.meta": contents.meta.decode()}
                write_part(tmp, contents.rank, tensors, meta=meta, compress=self._config.compress)
            if publishes is not None:
                self._publish(snapshot, tmp, found[0][0], publishes)
        except (OSError, FtError, ValueError) as error:
            if publishes is not None:
                shutil.rmtree(tmp, ignore_errors=True)
            return f"{type(error).__name__}: {error}"
        self.report.last_seconds = self._shell.clock() - began
        return ""

    def _publish(self, snapshot: SnapshotId, tmp: Path, contents: Contents, abandoned: threading.Event) -> None:
        deadline = self._shell.clock() + self._config.deadline
        wanted = set(range(contents.world))
        while missing := wanted - {int(path.name[5:].split(".")[0]) for path in tmp.glob("rank_*")}:
            if abandoned.is_set():
                raise DurableError(f"the agents have left that were to write ranks {sorted(missing)}")
            if self._shell.clock() > deadline:
                raise TimeoutError(f"waited {self._config.deadline:g} s for the parts of all {contents.world} ranks")
            time.sleep(0.05)
        meta: dict[str, Any] = {}
        with contextlib.suppress(msgspec.DecodeError):
            meta = msgspec.json.decode(contents.meta, type=dict[str, Any])
        identity = publication.Identity(
            run=snapshot.run, epoch=snapshot.epoch, step=snapshot.step, layout=snapshot.layout
        )
        publication.write_manifest(tmp, identity, ranks=contents.world, meta=meta)
        publication.verify(tmp)
        final = publication.folder(self._root, snapshot.step)
        if publication.publish(tmp, final):
            self.report.published += 1
            self._shell.journal.write("info", "published a checkpoint", folder=final)
        publication.prune(self._root, self._config.keep, self._config.keep_every)


def parts(data: Bytes) -> list[tuple[Contents, Bytes]]:
    """Return the workers' parts of a data buffer. Each part records its own length."""
    found = []
    at = 0
    while at + 16 <= len(data):
        try:
            contents_length(data[at:])
        except FtError:
            break
        contents = decode_contents(data[at:])
        found.append((contents, data[at : at + contents.size]))
        at += contents.size
        if len(found) == contents.workers:
            break
    return found
