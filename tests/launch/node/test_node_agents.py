"""The agents of a node while its run changes its layout: those of the layout before stay until they are not needed."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from keepwarm.files import await_readable
from keepwarm.ft.discovery.config import DurableConfig, FormerLayout, LayoutAgents, runtime_folder, runtime_folders
from keepwarm.ft.discovery.registry import AGENTS_FOLDER, TEMPLATE_FILE, Registry, newest_epoch, newest_generation
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.ft.transport.auth import run_identity
from keepwarm.launch.node.node_agents import NodeAgents
from keepwarm.launch.node.slot_table import FormerOwners, Table
from keepwarm.launch.node.snapshot_agent import SnapshotAgent
from tests.support.ft.nodes import Nodes, random_state


class Run(Nodes):
    """Agents of two nodes where those of a run in `folder` are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder, 2, groups=[((0, 1), 1)], durable=DurableConfig(root=str(folder / "checkpoints"), every=1000)
        )
        self.run = run_identity(self.secret)
        self.configs = [
            msgspec.structs.replace(
                config, run=self.run, shared=str(folder), folder=str(runtime_folder(self.run, config.slot))
            )
            for config in self.configs
        ]

    def agent(self, generation: int) -> SnapshotAgent:
        return SnapshotAgent(self.folder, "127.0.0.1", self.secret, generation=generation)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="keepwarm-") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        world = Run(tmp_path)
        try:
            world.start_all()
            (tmp_path / AGENTS_FOLDER / TEMPLATE_FILE).write_bytes(msgspec.json.encode(world.configs[0]))
            world.commit([random_state(rank, 2) for rank in range(2)], 7)
            yield world
        finally:
            world.close()


def test_former_agents_hold_and_write_the_state_of_a_lost_node_until_it_is_settled(run: Run) -> None:
    agents = NodeAgents(run.agent, "mine")
    try:
        agents.present.take(1)
        agents.present.ensure()
        run.kill(0)
        gathered = agents.gather([0], former=False, still_needed=lambda: True, deadline=120.0)
        assert isinstance(gathered, tuple), gathered
        assert gathered[1] == 7
        former = FormerOwners(generation=0, owners={0: "mine", 1: "mine"}, epoch=gathered[0], step=7)
        smaller = Table(slots=1, max_restarts=0, generation=1, former=former, owners={0: "mine"}, resized=True)
        agents.follow(smaller)
        named = msgspec.json.decode(agents.names(smaller), type=LayoutAgents)
        assert named == LayoutAgents(
            generation=1, former=FormerLayout(generation=0, slots=2, slot=0, epoch=gathered[0])
        )
        assert {run.status(slot).committed for slot in (0, 1)} == {(1, 7)}
        joined = msgspec.json.decode(NodeAgents(run.agent, "another").names(smaller), type=LayoutAgents)
        assert joined.former == FormerLayout(generation=0, slots=2, slot=None, epoch=gathered[0])

        again = agents.gather([], former=True, still_needed=lambda: True, deadline=120.0)
        assert isinstance(again, tuple), again
        assert again == (gathered[0] + 1, 7)
        checkpoints = run.folder / "checkpoints"
        assert agents.write(again, checkpoints, former=True, still_needed=lambda: True, deadline=120.0) == ""
        found = publication.latest(checkpoints)
        assert found is not None
        assert (read_manifest(found).step, len(read_manifest(found).parts)) == (7, 2)

        keepers = [os.pidfd_open(run.status(slot).keeper) for slot in (0, 1)]
        agents.follow(msgspec.structs.replace(smaller, former=None))
        assert all(await_readable(keeper, 60.0) for keeper in keepers)
        assert not (run.folder / AGENTS_FOLDER / TEMPLATE_FILE).exists()
    finally:
        agents.kill()


def test_gather_that_is_not_needed_any_more_ends(run: Run) -> None:
    agents = NodeAgents(run.agent, "mine")
    try:
        agents.present.take(1)
        agents.present.ensure()
        run.kill(0)
        answer = agents.gather([], former=False, still_needed=lambda: False, deadline=120.0)
        assert answer == "the nodes have changed, or this one was asked to end"
    finally:
        agents.kill()


def test_layouts_have_folders_of_their_own_and_epochs_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    assert newest_generation(tmp_path) == 0
    for generation in (0, 2, 10):
        Registry(tmp_path, generation).publish(0, ("127.0.0.1", generation + 1), 1)
        runtime_folder("run", 12, generation).mkdir(parents=True)
    assert [Registry(tmp_path, generation).resolve(0) for generation in (0, 2, 10)] == [
        ("127.0.0.1", 1), ("127.0.0.1", 3), ("127.0.0.1", 11),
    ]  # fmt: skip
    assert newest_generation(tmp_path) == 10
    assert len(runtime_folders("run")) == 3
    assert runtime_folders("another") == []
    (tmp_path / AGENTS_FOLDER / "layout-2" / "choice-9.json").touch()
    assert newest_epoch(tmp_path) == Registry(tmp_path).newest_epoch() == 9
