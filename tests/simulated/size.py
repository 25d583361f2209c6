"""What one commit, one epoch and the loss of a node cost a job of many members, in virtual time.

Two ways: the pure protocol of all members (`tests.simulated.protocol`), and real agents with small memories
(`tests.simulated.agents`). Groups have 4 members and one chunk of parity in each stripe; a node's state is 12 KiB.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from keepwarm.ft.agent.agent import Agent
from keepwarm.ft.protocol.messages import SnapshotId
from tests.simulated.agents import BUCKET, Agents, agents, groups_of
from tests.simulated.protocol import Protocol
from tests.simulated.training import LAYOUT, Training

GROUP, PARITY = 4, 1
PAYLOAD = (GROUP - PARITY) * BUCKET
"""Bytes of the state that a member sends to its group for a commit."""
LOST = 5
"""The slot whose node is lost. It has parent, children and a group."""
LIMIT_S = 120.0
"""Virtual seconds after which a wait has failed."""
LOOK_S = 1e-3
"""Interval of looks at whether everything is whole again."""
IDLE_S = 8.0
"""After which the links that an epoch needed are closed."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The figures of one job. Messages and bytes are those between agents, divided by their number."""

    members: int
    at_rest: int
    """Most links of a member while snapshots are taken."""
    deciding: int
    """Most links of a member while an epoch is decided, but for the lowest slots, which have one to each member."""
    messages: dict[str, float]
    """Of one commit, by type."""
    control_bytes: float
    """Of one commit, without the state itself."""
    commit_s: float
    """From the moment that workers ask for a buffer to the commit on the last agent."""
    epoch_messages: float
    """Of the first epoch, with the handshakes of its links."""
    decide_s: float
    """From the moment that ranks ask what the first epoch restores to the last answer."""
    rebuild_s: float
    """From the start of an empty agent in the place of a lost node to all data on all nodes, decoded by the others."""
    settle_s: float
    """From the same start to the moment that all agents know everything to be whole again, parity included."""
    cpu_s: float
    """What the simulation took of this machine."""

    @property
    def commit_messages(self) -> float:
        return sum(self.messages.values())


def of_protocol(members: int) -> Size:
    """Run the pure protocol: first epoch, two commits, the loss of a node."""
    began = time.process_time()
    job = Protocol(groups_of(members, GROUP, PARITY))
    timeline, at = job.timeline, job.timeline.now
    job.advance(1)
    assert timeline.run(lambda: job.answered == members, LIMIT_S)
    decide_s, epoch_messages = timeline.now - at, job.sent.total() / members
    timeline.rest(1.0)
    for step in (1, 2):
        for peers in job.peers:
            peers.clear()
        snapshot = SnapshotId("run", 1, step, LAYOUT)
        before, bytes_before = job.sent.copy(), job.wires.bytes
        job.offer(snapshot)
        assert timeline.run(lambda: job.committed(snapshot), LIMIT_S)  # noqa: B023
        timeline.rest(1.0)
    messages = job.sent - before
    size, at_rest = job.wires.bytes - bytes_before, max(map(len, job.peers))
    job.replace(LOST)
    at = timeline.now
    job.advance(2)
    assert timeline.run(lambda: job.answered == members, LIMIT_S)
    rebuild_s = timeline.now - at
    assert timeline.run(lambda: job.whole == members, LIMIT_S)
    assert job.settled(snapshot)
    return Size(
        members=members, at_rest=at_rest, deciding=sorted(map(len, job.peers))[-2],
        messages=_each(messages, members), control_bytes=size / members - PAYLOAD,
        commit_s=max(job.commits[snapshot].values()), epoch_messages=epoch_messages, decide_s=decide_s,
        rebuild_s=rebuild_s, settle_s=timeline.now - at, cpu_s=time.process_time() - began,
    )  # fmt: skip


def of_agents(members: int) -> Size:
    """Run real agents: first epoch, two commits, the loss of a node, and a commit after that."""
    began = time.process_time()
    with agents(groups_of(members, GROUP, PARITY)) as job:
        training = Training(job, wait=True)
        training.restart()
        assert job.timeline.run(lambda: not training.restarting, LIMIT_S), job.words()
        decide_s, epoch_messages = training.answered - training.asked, _sent(job).total() / members
        assert job.timeline.run(lambda: training.step == 1, LIMIT_S)
        training.stopped = True
        job.timeline.rest(IDLE_S)
        deciding = _links(job)
        job.timeline.rest(1.0)
        at_rest = _links(job)[-1]
        before, bytes_before = _sent(job), job.machine.wires.bytes
        training.stopped = False
        assert job.timeline.run(lambda: training.step == 2, LIMIT_S)
        training.stopped = True
        job.timeline.rest(0.5)
        messages, size = _sent(job) - before, job.machine.wires.bytes - bytes_before
        (times,) = [times for snapshot, times in training.commit_times.items() if snapshot.step == 2]
        assert len(times) == members
        rebuild_s, settle_s = _loss(job, training)
        return Size(
            members=members, at_rest=at_rest, deciding=deciding[-4], messages=_each(messages, members),
            control_bytes=size / members - PAYLOAD, commit_s=max(times.values()), epoch_messages=epoch_messages,
            decide_s=decide_s, rebuild_s=rebuild_s, settle_s=settle_s, cpu_s=time.process_time() - began,
        )  # fmt: skip


def _loss(job: Agents, training: Training) -> tuple[float, float]:
    """Lose a node, put another one into its place, and return after which time its data and everything was back."""
    before = training.committed
    job.lose(LOST)
    job.timeline.rest(1.0)
    at = job.timeline.now
    job.start(LOST)
    rebuilt = _until(job, lambda agent: agent.state.restorable and agent.state.epoch > before[0]) - at
    settled = _until(job, lambda agent: agent.state.committed is not None and agent.state.committed.age >= before) - at
    assert job.settled()
    training.restart()
    assert job.timeline.run(lambda: not training.restarting, LIMIT_S), job.words()
    assert training.restores[-1] is not None
    assert training.restores[-1].age == before
    training.stopped = False
    assert job.timeline.run(lambda: training.committed > before, LIMIT_S), job.words()
    return rebuilt, settled


def _until(job: Agents, holds: Callable[[Agent], bool]) -> float:
    """Return the moment at which something holds of all agents."""
    end = job.timeline.now + LIMIT_S
    while not all(node.agent is not None and holds(node.agent) for node in job.nodes):
        assert job.timeline.now < end, job.words()
        job.timeline.rest(LOOK_S)
    return job.timeline.now


def _links(job: Agents) -> list[int]:
    """Return the most links that each agent has had, in order, and begin to count again."""
    found = sorted(node.most_links for node in job.nodes)
    for node in job.nodes:
        node.most_links = 0
    return found


def _sent(job: Agents) -> collections.Counter[str]:
    total = collections.Counter[str]()
    for node in job.nodes:
        if node.process is not None:
            total += node.process.sent
    return total


def _each(messages: collections.Counter[str], members: int) -> dict[str, float]:
    return {name: count / members for name, count in sorted(messages.items())}


def names() -> list[str]:
    """Return the columns of a table of sizes."""
    found = [field.name for field in fields(Size) if field.name != "messages"]
    found.insert(4, "commit_messages")
    return found


def row(what: str, size: Size) -> str:
    """Return a row of a table."""
    values = [getattr(size, name) for name in names()]
    cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return f"| {what} | " + " | ".join(cells) + " |"
