"""Real agents of a whole job in one process, in virtual time, with nodes that fail and come back.

An agent here is `keepwarm.ft.agent.agent.Agent` with its own memory files, records, links and handshakes. Sockets,
threads, clocks and log files are those of `tests.simulated.machine`; workers are played by `tests.simulated.training`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from keepwarm.ft.agent.agent import TICK, Agent
from keepwarm.ft.discovery.config import AgentConfig, GroupConfig
from keepwarm.ft.keeper import FILES, memory_file
from keepwarm.ft.protocol.state import Mode
from keepwarm.ft.transport.auth import create_secret
from tests.simulated.machine import Machine, Process

BUCKET = 4096
RUN = "run"
KEEPER_S = 0.3
"""From the death of an agent to the first moment of the next one of its keeper: a Python process starts meanwhile."""


class Node:
    """One slot: its host, the memory files that its keeper has, and its agent while there is one."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.hosts = 0
        self.host = ""
        self.files: dict[str, int] = {}
        self.process: Process | None = None
        self.agent: Agent | None = None
        self.most_links = 0
        """The most links that an agent of this slot has had at a time since this was reset."""

    def take_host(self) -> None:
        """Be on another machine, whose memory is empty."""
        self.hosts += 1
        self.host = f"10.{self.hosts % 256}.{self.slot // 256}.{self.slot % 256}"
        self.files = {name: memory_file(name) for name in FILES if name not in ("lock", "config")}

    def forget(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files = {}


class Agents:
    """The agents of a job: one for each slot of the groups."""

    def __init__(self, folder: Path, groups: Sequence[tuple[Sequence[int], int]], scrub: float | None = None) -> None:
        self.machine = Machine()
        self.timeline = self.machine.timeline
        self.groups = [(tuple(members), parity) for members, parity in groups]
        self.nodes = [Node(slot) for slot in range(sum(len(members) for members, _ in self.groups))]
        self._folder, self._scrub = folder, scrub
        self._secret = folder / "secret"
        create_secret(self._secret)
        self.shared = folder / "shared"
        self.judge: Callable[[Agent], None] = lambda agent: None
        """Called with an agent after each of its ticks."""

    def config(self, node: Node) -> AgentConfig:
        members, parity = next(each for each in self.groups if node.slot in each[0])
        return AgentConfig(
            run=RUN, slot=node.slot, folder=str(self._folder / "runtime" / f"{RUN}-{node.slot}"),
            shared=str(self.shared), secret=str(self._secret), host=node.host,
            groups=tuple(GroupConfig(members=each, parity=p) for each, p in self.groups), lease=1e9, scrub=self._scrub,
            state_bytes=(len(members) - parity) * BUCKET, bucket_bytes=BUCKET,
        )  # fmt: skip

    # ---- nodes

    def start(self, slot: int) -> None:
        """Start an agent where there is none, with what memory the node has."""
        node = self.nodes[slot]
        if node.process is not None:
            return
        if not node.files:
            node.take_host()
        node.process = process = Process(self.machine, node.host)
        files = {name: os.dup(descriptor) for name, descriptor in node.files.items()}
        process.do(lambda: self._begin(node, files))
        self._tick(node, process)

    def _begin(self, node: Node, files: dict[str, int]) -> None:
        assert set(files) == set(FILES) - {"lock", "config"}
        node.agent = Agent(self.config(node), files, self.timeline.clock)

    def _tick(self, node: Node, process: Process) -> None:
        def tick() -> None:
            agent = node.agent
            if agent is not None and node.process is process:
                agent._tick(self.timeline.now)
                node.most_links = max(node.most_links, len(agent.network.links))
                self.judge(agent)
                assert not agent._ended, f"the agent of slot {node.slot} ends: {agent._ended}"
                process.after(TICK, tick)

        process.after((node.slot * 37 % 50) / 50 * TICK, tick)

    def kill(self, slot: int) -> None:
        """End an agent with SIGKILL. Its keeper starts another one with the same memory."""
        self._end(self.nodes[slot])
        self.timeline.after(KEEPER_S, lambda: self._restart(slot))

    def _restart(self, slot: int) -> None:
        if self.nodes[slot].files:
            self.start(slot)

    def _end(self, node: Node) -> None:
        if node.process is not None:
            node.process.kill()
        agent, node.agent, node.process = node.agent, None, None
        if agent is not None:
            agent.memory.close()
            agent._records.close()
            for listener in (agent.network._listener,):
                listener._close_spare()

    def lose(self, slot: int) -> None:
        """Take a node's power: its memory is gone, and nothing tells the others."""
        node = self.nodes[slot]
        self.machine.wires.gone.add(node.host)
        self._end(node)
        node.forget()

    def settled(self) -> bool:
        """Return whether the newest epoch's choice is in force on all agents and all chunks are there."""
        agents = [node.agent for node in self.nodes]
        epochs = {agent.state.epoch if agent is not None else -1 for agent in agents}
        return len(epochs) == 1 and all(agent is not None and _settled(agent) for agent in agents)

    def words(self) -> str:
        """Return what every agent is at, for people."""
        lines = []
        for node in self.nodes:
            if (agent := node.agent) is None:
                lines.append(f"slot {node.slot}: no agent")
                continue
            state = agent.state
            copies = ", ".join(f"{copy.snapshot} {copy.phase.value} {sorted(copy.good)}" for copy in state.copies)
            lines.append(
                f"slot {node.slot}: epoch {state.epoch} {state.mode.value}, decided {state.decided}, committed "
                f"{state.committed}, holds {copies or 'nothing'}, links {sorted(agent.network.links)}"
            )
        return "\n".join(lines)

    def log(self, slot: int, lines: int = 30) -> str:
        agent = self.nodes[slot].agent
        return "\n".join(map(str, list(agent.journal.lines)[-lines:])) if agent is not None else ""  # type: ignore[attr-defined]

    def close(self) -> None:
        for node in self.nodes:
            self._end(node)
            node.forget()


def _settled(agent: Agent) -> bool:
    state = agent.state
    decided = state.mode is Mode.ACTIVE and state.decided_epoch == state.epoch
    return decided and all(len(copy.good) == copy.group.size for copy in state.copies if copy.committed)


def groups_of(slots: int, size: int, parity: int) -> list[tuple[Sequence[int], int]]:
    """Return groups of `size` slots, each spread over all slots as a placement over racks gives them."""
    count = slots // size
    return [(range(index, slots, count), parity) for index in range(count)]


@contextlib.contextmanager
def agents(groups: Sequence[tuple[Sequence[int], int]], scrub: float | None = None) -> Iterator[Agents]:
    """Yield the agents of a job, started together, on a folder in memory."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        job = Agents(Path(folder), groups, scrub)
        with job.machine.installed():
            try:
                for node in job.nodes:
                    job.start(node.slot)
                yield job
            finally:
                job.close()
