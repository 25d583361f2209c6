"""Write committed snapshots as durable checkpoints while the workers keep training.

Each agent writes its own workers' parts, from bytes that it compares with the sealed checksums. The lowest live slot
waits for all parts, writes the manifest, verifies and publishes; where two agents take themselves for it, one waits
for the other. A failing, full or slow disk costs warnings and a later checkpoint.
"""

import contextlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.discovery.config import DurableConfig
from keepwarm.ft.discovery.side_thread import SideThread
from keepwarm.ft.errors import DurableError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import ITEM_SIZE, Contents, Piece
from keepwarm.ft.format.writer import age_notes, write_part_blocks
from keepwarm.ft.memory.sealed_data import BucketRotten, SealedData
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import SnapshotId

RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
"""Seconds until a write that the disk refused is tried again, doubled each time, up to the longest."""
POLL_S = 0.05
CLOSE_S = 5.0


@dataclass
class Report:
    """Outcome of the checkpoints written since this agent started."""

    written: int = 0
    published: int = 0
    failed: int = 0
    last_step: int = -1
    last_seconds: float = 0.0
    last_error: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One checkpoint to write: the snapshot, the folder it is assembled in, and who completes it."""

    snapshot: SnapshotId
    tmp: Path
    publishes: bool
    abandoned: threading.Event
    """Set when the agents that should have written missing parts are gone."""


@dataclass(frozen=True)
class Outcome:
    """How a write ended: "" or the error, and the bucket that was found to have rotted."""

    error: str = ""
    rotten: int | None = None


class DurableWriter:
    """Writes one checkpoint at a time on a thread of its own."""

    def __init__(self, shell: Shell, config: DurableConfig) -> None:
        self._shell, self._config = shell, config
        self._root = Path(config.root)
        self._thread = SideThread("durable")
        self._under_way = False
        self._next: tuple[SnapshotId, int] | None = None
        """The snapshot to write next, and the epoch that all writers name their folder after: the snapshot's, or a
        later one that a supervisor wants on disk."""
        self._owed = False
        self._saves: int | None = None
        """The epoch that a supervisor has asked to have on disk."""
        self._abandoned = threading.Event()
        """Set to abandon the most recently started checkpoint."""
        self.report = Report()

    @property
    def deadline(self) -> float:
        """Seconds that a checkpoint may take."""
        return self._config.deadline

    @property
    def busy(self) -> bool:
        return self._under_way or self._next is not None

    def committed(self, snapshot: SnapshotId) -> None:
        """Start writing a snapshot if it is due. Skip it if another one is being written."""
        due = snapshot.step % self._config.every == 0 or self._owed
        if not due or self.busy:
            self._owed = self._owed or due
            return
        self._next = snapshot, snapshot.epoch
        self._shell.dispatch(events.DurableStarted(snapshot))  # before anything can replace it

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
            self._next = state.decided, asked

    def tick(self) -> None:
        """Start what is to be written next, once the protocol keeps its buffer: without that, nothing is written."""
        if self._next is None or self._under_way:
            return
        (snapshot, epoch), self._next = self._next, None
        shell = self._shell
        copy = shell.state.copy(snapshot)
        if copy is not None and not copy.held:
            shell.dispatch(events.DurableStarted(snapshot))
            copy = shell.state.copy(snapshot)
        if copy is None or copy.data is None or not copy.held:
            self._owed = True
            shell.journal.write("info", "a checkpoint is passed over: its buffer is needed", step=snapshot.step)
            return
        self._owed, self._under_way, self._abandoned = False, True, threading.Event()
        first = min([shell.config.slot, *shell.network.links]) == shell.config.slot
        task = Task(
            snapshot=snapshot, tmp=publication.staging(self._root, epoch, snapshot.step),
            publishes=first, abandoned=self._abandoned,
        )  # fmt: skip
        sealed = SealedData(
            shell.memory.data[copy.data].data, copy.data_sums(shell.config.slot), shell.config.bucket_bytes
        )
        shell.pool.follow(self._thread.submit(self._write, task, sealed), partial(self._written, snapshot))

    def abandon(self) -> None:
        """Stop waiting for missing parts: the agents that should have written them are gone."""
        self._abandoned.set()

    def close(self) -> None:
        """Wait for the write under way, at most `CLOSE_S`: the agent has waited for it while it gave signs of life."""
        self.abandon()
        self._thread.close(CLOSE_S)

    def _written(self, snapshot: SnapshotId, outcome: Outcome) -> None:
        shell = self._shell
        self._under_way = False
        if outcome.error:
            self._owed = True
            self.report.failed += 1
            self.report.last_error = outcome.error
            shell.journal.write(
                "warning", "a checkpoint failed, the next is tried", step=snapshot.step, reason=outcome.error
            )
        else:
            self.report.written += 1
            self.report.last_step = snapshot.step
        copy = shell.state.copy(snapshot)
        if outcome.rotten is not None and copy is not None:
            stripes = copy.group.data_stripes(shell.config.slot)
            stripe = stripes[outcome.rotten // shell.memory.shape.chunk]
            shell.dispatch(events.Scrubbed(snapshot, stripe, False))
        shell.dispatch(events.DurableEnded(snapshot))

    # ---- on the thread

    def _write(self, task: Task, sealed: SealedData) -> Outcome:
        """Write this node's parts and, if it falls to this agent, complete the checkpoint. Never raise."""
        began, wait = self._shell.clock(), RETRY_S
        while True:
            try:
                self._write_parts(task, sealed)
                if task.publishes:
                    self._complete(task, sealed.parts()[0][0])
                break
            except BucketRotten as error:
                return Outcome(f"{type(error).__name__}: {error}", error.index)
            except OSError as error:
                late = self._shell.clock() + wait - began > self._config.deadline
                if isinstance(error, TimeoutError) or late or task.abandoned.wait(wait):
                    return Outcome(f"{type(error).__name__}: {error}")
                self.report.last_error = f"{type(error).__name__}: {error}"
                wait = min(2 * wait, LONGEST_RETRY_S)
            except Exception as error:  # a checkpoint less must not cost the agent, which holds the newer state
                return Outcome(f"{type(error).__name__}: {error}")
        self.report.last_seconds = self._shell.clock() - began
        return Outcome()

    def _write_parts(self, task: Task, sealed: SealedData) -> None:
        task.tmp.mkdir(parents=True, exist_ok=True)
        for contents, first in sealed.parts():
            starts = {piece.name: first + start for piece, start in contents.entries}
            pieces = sorted(
                (piece for piece, _ in contents.entries), key=lambda each: (-ITEM_SIZE[each.dtype], each.name)
            )

            def blocks(piece: Piece, starts: dict[str, int] = starts) -> Iterator[memoryview]:
                return sealed.blocks(starts[piece.name], starts[piece.name] + piece.bytes)

            meta = {"keepwarm.meta": contents.meta.decode(), **age_notes(*task.snapshot.age)}
            write_part_blocks(
                task.tmp, contents.rank, pieces, blocks, meta=meta, compress=self._config.compress
            )  # fmt: skip

    def _complete(self, task: Task, contents: Contents) -> None:
        """Publish the checkpoint, or wait until the agent that is at it has done so."""
        deadline = self._shell.clock() + self._config.deadline
        while True:
            with publication.assembling(task.tmp) as mine:
                if mine:
                    try:
                        self._publish(task, contents, deadline)
                    except BaseException:
                        shutil.rmtree(task.tmp, ignore_errors=True)
                        raise
                    return
            if not task.tmp.exists():
                if publication.published(self._root, *task.snapshot.age):
                    return
                raise DurableError(f"{task.tmp}: another agent gave it up")
            if self._shell.clock() > deadline:
                raise TimeoutError(f"waited {self._config.deadline:g} s for the agent that completes {task.tmp}")
            task.abandoned.wait(POLL_S)

    def _publish(self, task: Task, contents: Contents, deadline: float) -> None:
        snapshot, tmp = task.snapshot, task.tmp
        wanted = set(range(contents.world))
        while missing := wanted - {int(path.name[5:].split(".")[0]) for path in tmp.glob("rank_*")}:
            if task.abandoned.is_set():
                raise DurableError(f"the agents have left that were to write ranks {sorted(missing)}")
            if self._shell.clock() > deadline:
                raise TimeoutError(f"waited {self._config.deadline:g} s for the parts of all {contents.world} ranks")
            task.abandoned.wait(POLL_S)
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
        else:
            self._shell.journal.write("warning", "a restart prefers a checkpoint of a later epoch", folder=final)
        publication.prune(self._root, self._config.keep, self._config.keep_every, published=final)
