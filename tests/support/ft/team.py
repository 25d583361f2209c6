"""Snapshot agents in one process and one thread, with real sockets, memory and threads, driven step by step.

So that a test can say what happens between which two messages: an agent that is not pumped does nothing, a link is cut
when the test says so. Workers are played by the protocol's own events.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keepwarm.ft.agent.agent import Agent
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.discovery import config as agent_config
from keepwarm.ft.discovery.config import AgentConfig, GroupConfig
from keepwarm.ft.keeper import FILES, Holding
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import SnapshotId
from keepwarm.ft.protocol.state import Geometry, Mode
from keepwarm.ft.transport.auth import create_secret

BUCKET = 4096
LAYOUT = "layout"

PUBLISHED_S = 2.0
"""How long a new agent has for its address, without which others may choose before it has joined them. Some tests are
about folders that take none."""


class Team:
    """Agents of groups of nodes; each has one worker whose part fills the buffer."""

    def __init__(self, folder: Path, groups: Sequence[tuple[Sequence[int], int]], *, chunk: int = 3, **options: Any):
        secret = folder / "secret"
        create_secret(secret)
        self.configs: dict[int, AgentConfig] = {}
        for members, parity in groups:
            for slot in members:
                self.configs[slot] = AgentConfig(
                    run="run", slot=slot, folder=str(folder / "runtime" / str(slot)), shared=str(folder / "shared"),
                    secret=str(secret), groups=tuple(GroupConfig(members=tuple(m), parity=p) for m, p in groups),
                    state_bytes=chunk * (len(members) - parity) * BUCKET,
                    **{"bucket_bytes": BUCKET, "lease": 1e6, "scrub": None, "silence": 30.0} | options,
                )  # fmt: skip
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)  # `turn` never rests, and the agents' threads that use files need the interpreter
        self.agents: dict[int, Agent] = {}
        self.holdings: dict[int, Holding] = {}
        self.paused: set[int] = set()
        """Agents that stand still."""
        for slot in sorted(self.configs):
            self.start(slot)

    def start(self, slot: int) -> None:
        """An agent with an empty memory, or with the one of the agent that crashed."""
        if slot not in self.holdings:
            self.holdings[slot] = Holding(agent_config.write(self.configs[slot]))
        files = {name: os.dup(self.holdings[slot].files[name]) for name in FILES[2:]}
        agent = self.agents[slot] = Agent(self.configs[slot], files)
        buckets = agent.memory.shape.buckets
        agent.configured(Geometry(layout=LAYOUT, parts=(buckets,), chunk=agent.memory.shape.chunk))
        end = time.monotonic() + PUBLISHED_S
        while not agent.shared.published and time.monotonic() < end:
            for key, mask in agent.selector.select(0.01):
                key.data.ready(mask)
            agent._tick(agent.clock())

    def kill(self, slot: int) -> None:
        """Its memory is gone and its sockets closed, without a word."""
        self.crash(slot)
        self.holdings.pop(slot).close()

    def crash(self, slot: int) -> None:
        """Its sockets are closed without a word. Its memory stays."""
        self.agents.pop(slot).close()

    def turn(self) -> None:
        """Every agent that does not stand still does what there is to do."""
        for agent in [agent for slot, agent in self.agents.items() if slot not in self.paused]:
            for key, mask in agent.selector.select(0):
                key.data.ready(mask)
            agent._tick(agent.clock())

    def until(self, done: Callable[[], Any], what: str, deadline: float = 100.0, *, turn: bool = True) -> None:
        end = time.monotonic() + deadline
        while not done():
            assert time.monotonic() < end, f"waited for {what}: {self.say()}"
            if turn:
                self.turn()

    def say(self) -> str:
        return "; ".join(
            f"{slot}: epoch {a.state.epoch} {a.state.mode.value} decided {a.state.decided} good "
            f"{[sorted(copy.good) for copy in a.state.copies]}"
            for slot, a in self.agents.items()
        )

    def connected(self) -> bool:
        """Whether every link is there that its ends want to have."""
        return all(agent.network.links.keys() == agent.network._peers.keys() for agent in self.agents.values())

    def cut(self, one: int, other: int) -> None:
        """Break the link between two agents; what is under way on it is lost. They dial again."""
        link = self.agents[one].network.links.get(other)
        if link is not None:
            link.close("cut by the test")
        link = self.agents[other].network.links.get(one)
        if link is not None:
            link.close("cut by the test")

    # ---- what workers do

    def begin(self, epoch: int, slot: int = 0) -> None:
        self.agents[slot].election.begin(epoch)

    def recovered(self, epoch: int = 0) -> bool:
        """Everybody has the choice of one epoch in force, and all of it in memory."""
        newest = max(epoch, *(agent.state.epoch for agent in self.agents.values()))
        return all(
            agent.state.mode is Mode.ACTIVE
            and agent.state.decided_epoch == agent.state.epoch == newest
            and all(len(copy.good) == copy.group.size for copy in agent.state.copies if copy.committed)
            for agent in self.agents.values()
        )

    def recover(self, epoch: int, *, whole: bool = True) -> None:
        """A choice in force everywhere and, with `whole`, all of it back in memory."""
        self.begin(epoch, min(self.agents))

        def decided() -> bool:
            return all(agent.state.restorable and agent.state.epoch == epoch for agent in self.agents.values())

        self.until(lambda: self.recovered(epoch) if whole else decided(), f"epoch {epoch} to be decided")

    def content(self, slot: int, step: int) -> Bytes:
        size = self.agents[slot].memory.shape.data_bytes
        return np.random.default_rng((slot, step)).integers(0, 256, size, np.uint8)

    def whole(self) -> bool:
        """Whether what was restored, if anything, is known to be whole on all agents. Before, there may be no room."""
        for state in (agent.state for agent in self.agents.values()):
            committed = state.committed.age if state.committed is not None else (-1, -1)
            if state.decided is not None and committed < state.decided.age:
                return False
        return True

    def write(self, step: int, *, settled: bool = True) -> None:
        """Every worker is granted a buffer, writes it and seals it; with `settled`, once what was restored is whole."""
        self.until(lambda: not settled or self.whole(), "what was restored to be whole")
        for slot, agent in self.agents.items():
            snapshot = SnapshotId("run", agent.state.epoch, step, LAYOUT)
            agent.dispatch(events.WorkerOpened(0, snapshot))
            copy = agent.state.copy(snapshot)
            assert copy is not None, self.say()
            assert copy.data is not None
            agent.memory.data[copy.data].data[:] = self.content(slot, step)
            agent.dispatch(events.WorkerSealed(0, snapshot, bucket_sums(self.content(slot, step), BUCKET)))

    def take(self, step: int) -> None:
        """A snapshot, committed everywhere."""
        self.write(step)
        self.until(lambda: self.committed(step), f"step {step} to be committed")

    def committed(self, step: int) -> bool:
        ages = [agent.state.committed for agent in self.agents.values()]
        return all(age is not None and age.step >= step for age in ages)

    def chosen(self) -> int:
        """The step that was restored, on all agents."""
        decided = {agent.state.decided for agent in self.agents.values()}
        assert len(decided) == 1, self.say()
        (snapshot,) = decided
        assert snapshot is not None, self.say()
        return snapshot.step

    def rot(self, slot: int, stripe: int) -> None:
        """A byte of an agent's chunk of the newest committed snapshot changes."""
        agent = self.agents[slot]
        copy = agent.state.copy(agent.state.committed)
        assert copy is not None
        agent.memory.chunk(copy.data, copy.parity, stripe)[7] ^= 0x55

    def check(self, step: int) -> None:
        """Every agent holds what its worker wrote."""
        for slot, agent in self.agents.items():
            copy = agent.state.copy(agent.state.decided)
            assert agent.state.restorable, self.say()
            assert copy is not None, self.say()
            assert copy.snapshot.step == step
            assert copy.data is not None
            assert np.array_equal(agent.memory.data[copy.data].data, self.content(slot, step))

    def check_committed(self, step: int) -> None:
        """Every agent holds what its worker wrote of the newest committed snapshot."""
        for slot, agent in self.agents.items():
            copy = agent.state.copy(agent.state.committed)
            assert copy is not None, self.say()
            assert copy.data is not None
            assert copy.snapshot.step == step
            assert np.array_equal(agent.memory.data[copy.data].data, self.content(slot, step))

    def close(self) -> None:
        for slot in list(self.agents):
            self.kill(slot)
        sys.setswitchinterval(self._switch_interval)


@contextlib.contextmanager
def team(folder: Path, size: int, parity: int, **options: Any) -> Iterator[Team]:
    """One group, connected, in epoch 1, with steps 1 and 2 taken."""
    made = Team(folder, [(range(size), parity)], **options)
    try:
        made.until(made.connected, "all links")
        made.recover(1)
        made.take(1)
        made.take(2)
        yield made
    finally:
        made.close()
