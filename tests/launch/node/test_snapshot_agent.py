"""What a supervisor does about the agent of its slot when the run folder holds something else than it needs."""

import os
import tempfile
from pathlib import Path

import msgspec
import pytest

from keepwarm.ft.discovery.config import AgentConfig, GroupConfig
from keepwarm.ft.discovery.registry import AGENTS_FOLDER, TEMPLATE_FILE
from keepwarm.ft.errors import AgentError
from keepwarm.ft.transport.auth import run_identity
from keepwarm.ft.worker import client
from keepwarm.launch.node.node_agents import NodeAgents
from keepwarm.launch.node.peers import PeerListener, template_of
from keepwarm.launch.node.snapshot_agent import SnapshotAgent
from keepwarm.launch.node.view import Member

SECRET = b"s" * 64


def template(folder: Path, content: bytes | None = None) -> None:
    (folder / AGENTS_FOLDER).mkdir()
    config = AgentConfig(
        run="r", slot=0, folder=str(folder / "agent"), shared=str(folder), secret=str(folder / "secret"),
        groups=(GroupConfig(members=(0, 1), parity=1),), state_bytes=4096,
    )  # fmt: skip
    (folder / AGENTS_FOLDER / TEMPLATE_FILE).write_bytes(msgspec.json.encode(config) if content is None else content)


def test_node_that_cannot_read_the_template_starts_its_agent_from_that_of_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="kw-"))
    (tmp_path / AGENTS_FOLDER).mkdir()
    fifo = tmp_path / AGENTS_FOLDER / TEMPLATE_FILE
    os.mkfifo(fifo)  # reading it waits for ever
    config = AgentConfig(
        run=run_identity(SECRET), slot=0, folder="/unused", shared=str(tmp_path), secret=str(tmp_path / "no-secret"),
        groups=(GroupConfig(members=(0, 1), parity=1),), state_bytes=4096, bucket_bytes=4096, lease=30.0,
    )  # fmt: skip
    listener = PeerListener(SECRET, "127.0.0.1", "node-0")
    listener.template = msgspec.json.encode(config)
    members = {"node-0": Member(node="node-0", host="127.0.0.1", port=listener.port)}
    agent = SnapshotAgent(tmp_path, "127.0.0.1", SECRET, lambda: template_of(SECRET, members, "node-1"))
    agent.take(1)
    try:
        agent.ensure()
        assert agent.pid is not None
        assert agent.keeper is not None
    finally:
        agent.kill()
        listener.close()
        os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))
        client._children[-1].wait(30)


@pytest.mark.parametrize("content", [None, b"not json", b"{}"])
def test_template_of_another_layout_is_said_in_a_sentence(tmp_path: Path, content: bytes | None) -> None:
    template(tmp_path, content)
    agent = SnapshotAgent(tmp_path, "127.0.0.1", SECRET)
    agent.take(3)
    with pytest.raises(AgentError, match=r"template\.json: .* it has no agent for slot 3: "):
        agent.ensure()


def test_gather_with_template_of_another_layout_returns_the_reason(tmp_path: Path) -> None:
    template(tmp_path)
    agents = NodeAgents(lambda generation: SnapshotAgent(tmp_path, "127.0.0.1", SECRET, generation=generation), "node")
    agents.present.take(0)
    result = agents.gather([2], former=False, still_needed=lambda: True, deadline=1.0)
    assert isinstance(result, str)
    assert "no agent for slot 2" in result
