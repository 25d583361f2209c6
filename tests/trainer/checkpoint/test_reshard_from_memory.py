"""A layout reads its state from the memory of the agents of another one, to the bit, as it does from a checkpoint."""

from pathlib import Path

import pytest
import torch

from keepwarm.ft.discovery.config import FormerLayout
from keepwarm.ft.errors import AuthenticationFailed, ForeignSnapshot
from keepwarm.ft.protocol.messages import InventoryRequest, Read
from keepwarm.ft.transport.link import LinkLimits
from keepwarm.ft.transport.network import READER
from keepwarm.ft.worker import former_memory
from keepwarm.ft.worker.client import AgentClient
from keepwarm.ft.worker.reader import RankPlace
from keepwarm.ft.worker.remote_agent import RemoteAgent
from keepwarm.ft.worker.snapshotter import Restoration
from keepwarm.parallel.shard import Shard
from tests.support.ft.nodes import BUCKET, Nodes, together
from tests.support.layouts import Case, State, shards_of, whole_state
from tests.trainer.checkpoint.test_reshard import LAYOUTS, MODEL

SOURCES = {"data-4-hybrid": 1, "2x2x2": 2, "2x1x2-flat": 1}
"""Layouts that leave their memory, and their ranks on a node: four nodes each."""
TARGETS = {1: ("1x1x1", "data-3", "data-3-replicated", "pipeline-2-interleaved"), 2: ("2x1x3", "2x1x2-flat")}
"""Layouts that read it, by ranks on a node: on fewer nodes."""


SMALLER = {"1x1x1": (1, 0), "data-3": (1, 1), "2x1x2-flat": (2, 1)}
"""Layouts from which a run grows, their ranks on a node, and the parity of their groups."""
LARGER = {
    "1x1x1": ("data-3", "pipeline-2-interleaved", "data-4-hybrid"),
    "data-3": ("data-4-hybrid", "tensor-4"),
    "2x1x2-flat": ("2x1x3", "2x2x2", "2x2x1-uneven-stages"),
}


class Run(Nodes):
    """Four nodes, any two of which may be lost, or as many as are said."""

    def __init__(self, folder: Path, workers: int, nodes: int = 4, parity: int = 2) -> None:
        super().__init__(folder, nodes, workers=workers, groups=[(range(nodes), parity)], state_bytes=1 << 20)
        self.found: dict[int, former_memory.Found] = {}
        """What the ranks of each node have told of its agent, which all ranks hear."""

    def read(self, epoch: int, slot: int, place: RankPlace, shards: dict[str, Shard]) -> Restoration | str:
        former = FormerLayout(generation=0, slots=self.nodes, slot=slot, epoch=epoch)
        socket, worker = self.configs[slot].socket, place.rank % place.workers
        client = AgentClient(socket, run=self.run, secret=self.secret, worker=worker, deadline=120.0)
        try:
            memory, found = former_memory.attach(client, former, place.workers)
            self.found |= former_memory.decoded([b""] * slot + [former_memory.encoded(found)])
            restored, _ = former_memory.restore_former(memory, place, shards, ())
            return restored
        finally:
            client.close()

    def read_elsewhere(self, epoch: int, place: RankPlace, shards: dict[str, Shard]) -> Restoration | str:
        former = FormerLayout(generation=0, slots=self.nodes, slot=None, epoch=epoch)
        found = former_memory.chosen(self.found, place.node)
        client = self.reader(found, place.rank)
        try:
            restored, _ = former_memory.restore_former(
                former_memory.elsewhere(client, former, found), place, shards, ()
            )
            return restored
        finally:
            client.close()

    def reader(self, found: former_memory.Found, rank: int) -> AgentClient:
        agent = RemoteAgent(
            host=found.address.host, port=found.address.port, bucket_bytes=found.bucket_bytes,
            limits=LinkLimits(silence=30.0),
        )  # fmt: skip
        return AgentClient(agent, run=self.run, secret=self.secret, worker=rank, role=READER, deadline=120.0)


def committed(world: Run, case: Case, state: State) -> None:
    """Have the run's ranks commit the state of one step, and leave."""
    states = [shards_of(rank, MODEL, case, state) for rank in range(world.world)]
    world.commit(states, 7, b"small state")  # type: ignore[arg-type]


def place_of(rank: int, world: int, workers: int) -> RankPlace:
    return RankPlace(
        rank=rank, world=world, workers=workers, node=rank // workers, nodes=world // workers, bucket_bytes=BUCKET
    )


def read_by_all(world: Run, epoch: int, case: Case) -> list[dict[str, Shard]]:
    """What the ranks of a layout read that run where slots 1 and 3 have survived, and a third where slot 0 is back."""
    size, workers = case.layout.world_size, world.workers
    found = [shards_of(rank, MODEL, case, None) for rank in range(size)]

    def restored(rank: int) -> Restoration | str:
        return world.read(epoch, (1, 3, 0)[rank // workers], place_of(rank, size, workers), found[rank])

    for result in together(restored, range(size)):
        assert isinstance(result, Restoration), result
        assert (result.step, result.meta) == (7, b"small state")
    return found


@pytest.mark.dist
@pytest.mark.parametrize("source", SOURCES)
def test_reshard_from_memory_of_fewer_nodes_equals_what_was_saved(tmp_path: Path, source: str) -> None:
    """Two nodes are lost: their memory is decoded for substitutes on the others before it is read."""
    workers, state = SOURCES[source], whole_state(MODEL, seed=5)
    world = Run(tmp_path, workers)
    try:
        world.start_all()
        committed(world, LAYOUTS[source], state)
        for slot in (0, 2):
            world.kill(slot)
        together(world.start, (0, 2))
        for epoch, target in enumerate(TARGETS[workers], 2):
            for rank, shards in enumerate(read_by_all(world, epoch, LAYOUTS[target])):
                expected = shards_of(rank, MODEL, LAYOUTS[target], state)
                for name, shard in shards.items():
                    assert torch.equal(shard.local, expected[name].local), f"{target}, rank {rank}: {name}"
    finally:
        world.close()


@pytest.mark.dist
def test_reshard_from_memory_that_cannot_serve_says_why_and_writes_nothing(tmp_path: Path) -> None:
    world = Run(tmp_path, 1)
    try:
        world.start_all()
        committed(world, LAYOUTS["data-4-hybrid"], whole_state(MODEL, seed=5))
        wider = MODEL.model_copy(update={"ffn_size": 16})
        shards = shards_of(0, wider, LAYOUTS["1x1x1"], None)
        with pytest.raises(ForeignSnapshot, match="this is the state of another model"):
            world.read(2, 1, place_of(0, 1, 1), shards)
        assert not any(shard.local.any() for shard in shards.values())
        for slot in (0, 2, 3):
            world.kill(slot)
        together(world.start, (0, 2, 3))
        answer = world.read(3, 1, place_of(0, 1, 1), shards_of(0, MODEL, LAYOUTS["1x1x1"], None))
        assert isinstance(answer, str)
        assert "needs 2 good chunks and has 1; those of slots [0, 2, 3] are lost" in answer
    finally:
        world.close()


@pytest.mark.dist
@pytest.mark.parametrize("source", SMALLER)
def test_reshard_from_memory_of_nodes_that_joined_equals_what_was_saved(tmp_path: Path, source: str) -> None:
    """Nodes without an agent of the smaller layout read from those of others, one of which was decoded before."""
    (workers, parity), state = SMALLER[source], whole_state(MODEL, seed=5)
    nodes = LAYOUTS[source].layout.world_size // workers
    world = Run(tmp_path, workers, nodes, parity)
    try:
        world.start_all()
        committed(world, LAYOUTS[source], state)
        if parity:
            world.kill(1)
            world.start(1)
        for epoch, target in enumerate(LARGER[source], 2):
            case = LAYOUTS[target]
            found = [shards_of(rank, MODEL, case, None) for rank in range(case.layout.world_size)]
            world.found = {}

            def restored(
                rank: int, epoch: int = epoch, case: Case = case, found: list[dict[str, Shard]] = found
            ) -> Restoration | str:
                place = place_of(rank, case.layout.world_size, workers)
                if place.node < nodes:
                    return world.read(epoch, place.node, place, found[rank])
                return world.read_elsewhere(epoch, place, found[rank])

            here = nodes * workers
            for ranks in (range(here), range(here, case.layout.world_size)):
                for result in together(restored, ranks) if ranks else []:
                    assert isinstance(result, Restoration), result
                    assert (result.step, result.meta) == (7, b"small state")
            for rank, shards in enumerate(found):
                expected = shards_of(rank, MODEL, case, state)
                for name, shard in shards.items():
                    assert torch.equal(shard.local, expected[name].local), f"{target}, rank {rank}: {name}"
    finally:
        world.close()


@pytest.mark.dist
def test_reader_gets_bytes_and_cannot_say_anything_else(tmp_path: Path) -> None:
    world = Run(tmp_path, 1, 3, 1)
    try:
        world.start_all()
        committed(world, LAYOUTS["data-3"], whole_state(MODEL, seed=5))
        status = world.status(0)
        shards = shards_of(0, MODEL, LAYOUTS["1x1x1"], None)
        assert isinstance(world.read(2, 0, place_of(0, 1, 1), shards), Restoration)
        found = world.found[0]
        assert found.snapshot is not None
        for wrong in (
            InventoryRequest(epoch=99),
            Read(epoch=2, snapshot=found.snapshot, owner=3, first=0, count=1),
        ):
            reader = world.reader(found, 0)
            try:
                assert len(reader.read(epoch=2, snapshot=found.snapshot, owner=1, first=0, count=1)) == BUCKET
                reader._send(wrong)
                reader._until(lambda: reader.gone, 30.0, "to be sent away")  # noqa: B023
            finally:
                reader.close()
        assert (world.status(0).pid, world.status(0).epoch) == (status.pid, 2)
        with pytest.raises(AuthenticationFailed):
            AgentClient(
                RemoteAgent(host="127.0.0.1", port=found.address.port, bucket_bytes=BUCKET), run=world.run,
                secret=b"x" * 64, role=READER, deadline=30.0,
            )  # fmt: skip
    finally:
        world.close()
