"""Emulated nodes for tests of the snapshot agent: real agent processes, shards of plain tensors, workers in threads."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepwarm.files import await_readable
from keepwarm.ft.discovery.config import AgentConfig, GroupConfig
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.transport.auth import create_secret
from keepwarm.ft.worker import client
from keepwarm.ft.worker.client import AgentClient
from keepwarm.ft.worker.reader import RankPlace
from keepwarm.ft.worker.snapshotter import SnapshotOptions, Snapshotter, plan_part

BUCKET = 65536


@dataclass
class Tensor:
    """A shard without an engine."""

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    local: torch.Tensor
    replicas: tuple[int, ...]
    flat: tuple[int, int] | None = None


def wait_committed(snapshotter: Snapshotter, deadline: float = 120.0) -> None:
    """Return once the agent has said that what the snapshotter sealed last, or something newer, is committed."""
    sealed, end = snapshotter.sealed, time.monotonic() + deadline
    assert sealed is not None, snapshotter.failure
    while not any(commit.snapshot.age >= sealed.age for commit in list(snapshotter.client.commits)):
        assert time.monotonic() < end, f"{sealed} was not committed within {deadline:g} s"
        time.sleep(0.001)


class Nodes:
    """As many agents as nodes, each with as many workers; every worker is a client in this process or another."""

    def __init__(
        self, folder: Path, nodes: int, *, workers: int = 1, groups: Sequence[tuple[Sequence[int], int]] | None = None,
        state_bytes: int = 4 << 20, **options: Any,
    ) -> None:  # fmt: skip
        self.nodes, self.workers, self.world = nodes, workers, nodes * workers
        self.run, self.folder = "test-run", folder
        self.secret_path = folder / "secret"
        self.secret = create_secret(self.secret_path)
        chosen = groups or [(range(nodes), 1 if nodes > 1 else 0)]
        self.configs = [
            AgentConfig(
                run=self.run, slot=slot, folder=str(folder / "runtime" / str(slot)), shared=str(folder / "shared"),
                secret=str(self.secret_path),
                groups=tuple(GroupConfig(members=tuple(members), parity=parity) for members, parity in chosen),
                state_bytes=state_bytes, **{"bucket_bytes": BUCKET, "lease": 300.0, "scrub": None} | options,
            )
            for slot in range(nodes)
        ]  # fmt: skip
        self.clients: list[AgentClient] = []
        self.pids: dict[int, int] = {}
        """Of the agents, by slot."""
        self.keepers: dict[int, int] = {}

    def start(self, slot: int) -> None:
        client.ensure_agent(self.configs[slot], 120.0)
        self.look(slot)

    def look(self, slot: int) -> None:
        """Learn the processes of a slot."""
        status = self.status(slot)
        self.pids[slot], self.keepers[slot] = status.pid, status.keeper

    def start_all(self) -> None:
        with ThreadPoolExecutor(self.nodes) as pool:
            list(pool.map(self.start, range(self.nodes)))

    def connect(self, rank: int) -> AgentClient:
        node, worker = divmod(rank, self.workers)
        made = AgentClient(self.configs[node].socket, run=self.run, secret=self.secret, worker=worker, deadline=120.0)
        self.clients.append(made)
        return made

    def place(self, rank: int) -> RankPlace:
        return RankPlace(
            rank=rank, world=self.world, workers=self.workers, node=rank // self.workers, nodes=self.nodes,
            bucket_bytes=self.configs[0].bucket_bytes,
        )  # fmt: skip

    def snapshotters(
        self, states: Sequence[dict[str, Tensor]], layout: str = "layout", only: int | None = None, **options: Any
    ) -> list[Snapshotter]:
        """One per rank, all attached; `only` makes that rank's alone."""

        def make(rank: int) -> Snapshotter:
            return Snapshotter(
                self.connect(rank), states[rank], self.place(rank), layout=layout,
                options=SnapshotOptions(**{"deadline": 120.0, "meta_bytes": 1024} | options),
            )  # fmt: skip

        return together(make, range(self.world) if only is None else [only])

    def commit(self, states: Sequence[dict[str, Tensor]], step: int, small: bytes = b"{}") -> None:
        """Have the ranks of a first epoch commit the state of one step, and leave."""
        snapshotters = self.snapshotters(states)
        together(lambda each: each.restore(1), snapshotters)
        for each in snapshotters:
            each.offer(step, small)
        for each in snapshotters:
            each.join()
            wait_committed(each)
        for one in self.clients:
            one.close()
        self.clients.clear()

    def status(self, slot: int) -> Status:
        path = self.configs[slot].socket
        onlooker = AgentClient(path, run=self.run, secret=self.secret, worker=0, role="onlooker", deadline=120.0)
        try:
            return onlooker.status()
        finally:
            onlooker.close()

    def kill(self, slot: int) -> None:
        """SIGKILL to a keeper: its agent dies with it, and the memory is gone."""
        with ended(self.pids[slot]):
            os.kill(self.keepers[slot], signal.SIGKILL)
        self.wait_dead(slot)

    def crash(self, *slots: int) -> None:
        """SIGKILL to agents alone: their keepers start the next ones with the same memory. Return once they answer."""
        before = dict(self.pids)
        with contextlib.ExitStack() as stack:
            for slot in slots:
                stack.enter_context(ended(self.pids[slot]))
            for slot in slots:
                os.kill(self.pids[slot], signal.SIGKILL)
        for slot in slots:
            self.start(slot)
            assert self.pids[slot] != before[slot]

    def wait_dead(self, slot: int, deadline: float = 20.0) -> None:
        """Wait until a slot's keeper has ended, which does so after its agent unless it is killed."""
        for child in client._children:
            if child.pid == self.keepers.get(slot):
                child.wait(deadline)

    def log(self, slot: int) -> str:
        return (self.folder / "shared" / "agents" / f"agent-{slot}.log").read_text()

    def close(self) -> None:
        for each in self.clients:
            with contextlib.suppress(Exception):
                each.close()
        for slot, keeper in self.keepers.items():
            if any(child.pid == keeper and child.poll() is None for child in client._children):
                os.kill(keeper, signal.SIGTERM)
            self.wait_dead(slot)


@contextlib.contextmanager
def ended(pid: int, deadline: float = 20.0) -> Iterator[None]:
    """Wait in the end until a process that the block kills is dead, with all of its threads, and its sockets closed."""
    process = os.pidfd_open(pid)
    try:
        yield
        assert await_readable(process, deadline), f"process {pid} has not died"
    finally:
        os.close(process)


def together(function: Any, items: Any) -> list[Any]:
    """Call a function for all items at once, one thread each; what blocks waits for the others."""
    items = list(items)
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def nodes(folder: Path, count: int, **options: Any) -> Iterator[Nodes]:
    world = Nodes(folder, count, **options)
    try:
        world.start_all()
        yield world
    finally:
        world.close()


def random_state(rank: int, world: int, *, seed: int = 0, rows: int = 64) -> dict[str, Tensor]:
    """A matrix split by rows over all ranks, a bias that all replicate, a counter, a bf16 vector."""
    shared = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(seed * 1000 + rank + 1)
    everyone = tuple(range(world))
    share = rows // world
    tensors = [
        Tensor("w", (rows, 300), (rank * share, 0), (share, 300), torch.randn(share, 300, generator=own), (rank,)),
        Tensor("b", (40_000,), (0,), (40_000,), torch.randn(40_000, generator=shared), everyone),
        Tensor("small", (7,), (0,), (7,), torch.randn(7, generator=shared).bfloat16(), everyone),
        Tensor("step", (), (), (), torch.randint(1000, (), generator=shared), everyone),
    ]
    return {tensor.name: tensor for tensor in tensors}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name].local, two[name].local) for name in one)


__all__ = ["BUCKET", "Nodes", "Tensor", "equal", "nodes", "plan_part", "random_state", "together"]
