"""Training as agents see it: one worker a node, a barrier a step, a snapshot a step, restarts that restore.

What a worker writes is a function of the snapshot and the slot, so that every byte that is restored can be judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from keepwarm.ft.agent.agent import Agent
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.protocol.messages import (  # fmt: skip
    Attach,
    Cancel,
    Committed,
    EpochBegan,
    Granted,
    Open,
    Refused,
    Restore,
    Restored,
    Revoked,
    Seal,
    SnapshotId,
    Wire,
)
from keepwarm.ft.protocol.state import Geometry, Mode
from tests.simulated.agents import BUCKET, RUN, Agents, Node
from tests.simulated.machine import VirtualSession

WRITE_S = 1e-3
LOCAL_S = 20e-6
"""A message between a worker and its agent."""
RANKS_S = 1.0
"""Between the end of the ranks and the first moment of the next ones."""
AGAIN_S = 0.1
"""Interval at which a worker without an agent looks for one."""
GIVES_UP_S = 60.0
LAYOUT = "layout"


def content(snapshot: SnapshotId, slot: int, size: int) -> Bytes:
    """Return what the worker of a slot writes in a snapshot."""
    seed = (snapshot.epoch * 1_000_003 + snapshot.step * 8191 + slot * 131 + 1) * 0x9E3779B97F4A7C15 % 2**64
    numbers = (np.arange(size // 8, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0xBF58476D1CE4E5B9)
    return (numbers ^ (numbers >> np.uint64(29))).view(np.uint8)


@dataclass
class Worker:
    """The worker of one node."""

    node: Node
    agent: object = None
    """The agent that it is attached to."""
    session: VirtualSession | None = None
    epoch: int = 0
    busy: bool = False
    """It has offered the step's snapshot and not heard or written the end of it."""
    restored: Restored | None = None
    read: Bytes | None = None
    """What it read from the buffer of its answer, as soon as it had it."""
    revoked: set[SnapshotId] = field(default_factory=set)


class Training:
    """All workers. `wait` is whether they wait for a buffer when none is free, `step_s` what a step takes."""

    def __init__(self, job: Agents, *, wait: bool, step_s: float = 0.25) -> None:
        self.job, self._wait, self._step_s = job, wait, step_s
        self.workers = [Worker(node) for node in job.nodes]
        self.step = 0
        self.committed: tuple[int, int] = (-1, -1)
        """Age of the newest snapshot that a worker was told to be committed, or that was restored."""
        self.offered: dict[SnapshotId, float] = {}
        self.commit_times: dict[SnapshotId, dict[int, float]] = {}
        """When which slot was told of a commit, in seconds since the snapshot was offered."""
        self.restarting = False
        self.restores: list[SnapshotId | None] = []
        self.asked = self.answered = 0.0
        """When the ranks began to ask what they restore, and when the last one had it."""
        self.stopped = False
        """Whether no further step begins."""
        self._target = self._life = 0
        self._newest: dict[int, tuple[int, int]] = {}
        """Age of the newest snapshot of each epoch that a worker was told to be committed."""
        self._judged: dict[int, int] = {}
        job.judge = self._judge_choice

    def _judge_choice(self, agent: Agent) -> None:
        """Check once what an epoch chooses, whether or not any rank restores it."""
        state = agent.state
        if state.mode is not Mode.ACTIVE or self._judged.get(state.incarnation) == state.decided_epoch:
            return
        self._judged[state.incarnation] = state.decided_epoch
        before = max((age for epoch, age in self._newest.items() if epoch < state.decided_epoch), default=(-1, -1))
        age = (-1, -1) if state.decided is None else state.decided.age
        chosen = f"epoch {state.decided_epoch} chooses {state.decided}"
        assert age >= before, f"{before} was committed, and {chosen}: {agent.shared.reason(state.decided_epoch)}"

    # ---- starting

    def restart(self) -> None:
        """End all ranks and start others, which restore."""
        self.restarting, self._target = True, 0
        self._life += 1
        for worker in self.workers:
            self._leave(worker)
            worker.busy, worker.restored = False, None
        self._later(RANKS_S, self._look)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        life = self._life

        def act() -> None:
            if life == self._life:
                action()

        self.job.timeline.after(seconds, act)

    def _leave(self, worker: Worker) -> None:
        node, agent = worker.node, worker.node.agent
        if agent is not None and worker.agent is agent and node.process is not None:
            agent.sessions.workers.pop(0, None)
            node.process.after(0.0, partial(agent.worker_lost, 0))
        worker.agent = worker.session = None

    def _look(self) -> None:
        """Attach the workers of all nodes, then ask what is restored."""
        for worker in self.workers:
            if worker.agent is None or worker.agent is not worker.node.agent:
                self._attach(worker)
                worker.restored = None
        here = [worker for worker in self.workers if worker.agent is not None and worker.agent is worker.node.agent]
        if len(here) == len(self.workers):
            self._ask()
        self._later(AGAIN_S, self._look if self.restarting else self._keep_attached)

    def _keep_attached(self) -> None:
        """Look for the agents of nodes whose agent has died, as the next snapshot does."""
        for worker in self.workers:
            if worker.agent is None or worker.agent is not worker.node.agent:
                self._attach(worker)
        self._later(AGAIN_S, self._keep_attached)

    def _attach(self, worker: Worker) -> None:
        node, agent = worker.node, worker.node.agent
        worker.agent = worker.session = None
        if agent is None or node.process is None:
            return
        shape = agent.memory.shape
        attach = Attach(run=RUN, layout=LAYOUT, worker=0, workers=1, buckets=shape.buckets)
        worker.session = session = VirtualSession(attach, lambda message: self._heard(worker, session, message))
        worker.agent = agent
        worker.revoked.clear()

        def attached() -> None:
            agent.sessions.workers[0] = session  # type: ignore[assignment]
            answer = agent.configured(Geometry(layout=LAYOUT, parts=(shape.buckets,), chunk=shape.chunk))
            worker.epoch = max(worker.epoch, answer.epoch)

        node.process.do(attached)

    def _ask(self) -> None:
        """Have every worker ask, all for the same epoch, until all have restored it."""
        if not self._target:
            self._target = max(worker.epoch for worker in self.workers) + 1
            self.asked = self.job.timeline.now
        answers = [worker.restored for worker in self.workers]
        epochs = {answer.epoch for answer in answers if answer is not None}
        if all(answer is not None for answer in answers) and len(epochs) == 1:
            self._go_on([answer for answer in answers if answer is not None])
            return
        self._target = max(self._target, *epochs, 0)
        for worker, answer in zip(self.workers, answers, strict=True):
            session = worker.session
            waits = session is not None and session.waits_for_epoch == self._target
            if (answer is None or answer.epoch < self._target) and not waits:
                self._tell(worker, Restore(epoch=self._target))

    def _go_on(self, answers: list[Restored]) -> None:
        chosen = {answer.snapshot for answer in answers}
        assert len(chosen) == 1, f"the ranks restore different snapshots: {chosen}"
        (snapshot,) = chosen
        age = (-1, -1) if snapshot is None else snapshot.age
        reason = answers[0].text
        assert age >= self.committed, f"{self.committed} was committed, and {snapshot} is restored: {reason}"
        for worker, answer in zip(self.workers, answers, strict=True):
            worker.epoch = answer.epoch
            if snapshot is not None:
                self._judge(worker, snapshot, answer)
        self.restores.append(snapshot)
        self.committed = max(self.committed, age)
        self.step = 0 if snapshot is None else snapshot.step
        self.restarting = False
        self._later(self._step_s, self._begin_step)

    def _judge(self, worker: Worker, snapshot: SnapshotId, answer: Restored) -> None:
        assert worker.read is not None
        right = content(snapshot, worker.node.slot, len(worker.read))
        assert np.array_equal(worker.read, right), f"slot {worker.node.slot} restores other bytes of {snapshot}"
        assert answer.sums == bucket_sums(right, BUCKET), f"slot {worker.node.slot} restores other checksums"

    # ---- steps

    def _begin_step(self) -> None:
        if self.stopped:
            self._later(AGAIN_S, self._begin_step)
            return
        self.step += 1
        epoch = max(worker.epoch for worker in self.workers)
        snapshot = SnapshotId(RUN, epoch, self.step, LAYOUT)
        self.offered[snapshot] = self.job.timeline.now
        for worker in self.workers:
            if worker.agent is not None and worker.agent is worker.node.agent:
                worker.busy = True
                self._tell(worker, Open(snapshot=snapshot, wait=self._wait))
        self._later(GIVES_UP_S, lambda: self._give_up(snapshot))
        self._later(self._step_s, lambda: self._end_step(snapshot))

    def _end_step(self, snapshot: SnapshotId) -> None:
        """Begin the next step once no worker is busy: every step needs all of them."""
        for worker in self.workers:
            if worker.agent is not worker.node.agent:
                worker.busy = False
        if any(worker.busy for worker in self.workers):
            self._later(0.01, lambda: self._end_step(snapshot))
        else:
            self._begin_step()

    def _give_up(self, snapshot: SnapshotId) -> None:
        if snapshot.step != self.step:
            return
        for worker in self.workers:
            if worker.busy:
                worker.busy = False
                self._tell(worker, Cancel(snapshot=snapshot))

    # ---- messages

    def _tell(self, worker: Worker, message: Wire) -> None:
        node, agent, session = worker.node, worker.node.agent, worker.session
        if agent is not None and node.process is not None and session is not None and worker.agent is agent:
            node.process.after(LOCAL_S, lambda: self._arrived(worker, session, message))

    def _arrived(self, worker: Worker, session: VirtualSession, message: Wire) -> None:
        agent = worker.node.agent
        if agent is not None and worker.session is session:
            agent.worker_message(session, message)  # type: ignore[arg-type]

    def _heard(self, worker: Worker, session: VirtualSession, message: Wire) -> None:
        self._later(LOCAL_S, lambda: self._handle(worker, session, message))

    def _handle(self, worker: Worker, session: VirtualSession, message: Wire) -> None:
        if worker.session is not session or worker.agent is not worker.node.agent:
            return
        match message:
            case Granted(snapshot=snapshot, buffer=buffer):
                self._later(WRITE_S, lambda: self._write(worker, session, snapshot, buffer))
            case Refused(snapshot=snapshot):
                self._done(worker, snapshot)
            case Revoked(snapshot=snapshot):
                worker.revoked.add(snapshot)
                self._tell(worker, Cancel(snapshot=snapshot))
                self._done(worker, snapshot)
            case Committed(snapshot=snapshot):
                self._committed(worker, snapshot)
            case EpochBegan(epoch=epoch):
                worker.epoch = max(worker.epoch, epoch)
            case Restored():
                self._restored(worker, message)

    def _restored(self, worker: Worker, answer: Restored) -> None:
        """Read what is restored. A rank whose bytes are not those of their checksums fails, and with it all ranks."""
        agent = worker.node.agent
        assert agent is not None
        worker.epoch = max(worker.epoch, answer.epoch)
        if answer.snapshot is not None:
            worker.read = agent.memory.data[answer.buffer].data.copy()
            if bucket_sums(worker.read, BUCKET) != answer.sums:
                self.restart()
                return
        worker.restored, self.answered = answer, self.job.timeline.now

    def _done(self, worker: Worker, snapshot: SnapshotId) -> None:
        if snapshot.step == self.step:
            worker.busy = False

    def _write(self, worker: Worker, session: VirtualSession, snapshot: SnapshotId, buffer: int) -> None:
        """Copy the state to the buffer, unless the agent that granted it has gone or has revoked it."""
        agent = worker.node.agent
        if agent is None or worker.agent is not agent or worker.session is not session or snapshot in worker.revoked:
            return
        data = agent.memory.data[buffer].data
        data[:] = content(snapshot, worker.node.slot, len(data))
        self._tell(worker, Seal(snapshot=snapshot, sums=bucket_sums(data, BUCKET)))
        self._done(worker, snapshot)

    def _committed(self, worker: Worker, snapshot: SnapshotId) -> None:
        self.committed = max(self.committed, snapshot.age)
        self._newest[snapshot.epoch] = max(snapshot.age, self._newest.get(snapshot.epoch, snapshot.age))
        since = self.job.timeline.now - self.offered[snapshot]
        self.commit_times.setdefault(snapshot, {})[worker.node.slot] = since


__all__ = ["LAYOUT", "Training", "content"]
