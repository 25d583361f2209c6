"""What a supervisor does about the agent of its slot when the run folder holds something else than it needs."""

from pathlib import Path

import msgspec
import pytest

from keepwarm.ft.discovery.config import AgentConfig, GroupConfig
from keepwarm.ft.discovery.registry import AGENTS_FOLDER, TEMPLATE_FILE
from keepwarm.ft.errors import AgentError
from keepwarm.launch.node.node_agents import NodeAgents
from keepwarm.launch.node.snapshot_agent import SnapshotAgent


def template(folder: Path, content: bytes | None = None) -> None:
    (folder / AGENTS_FOLDER).mkdir()
    config = AgentConfig(
        run="r", slot=0, folder=str(folder / "agent"), shared=str(folder), secret=str(folder / "secret"),
        groups=(GroupConfig(members=(0, 1), parity=1),), state_bytes=4096,
    )  # fmt: skip
    (folder / AGENTS_FOLDER / TEMPLATE_FILE).write_bytes(msgspec.json.encode(config) if content is None else content)


@pytest.mark.parametrize("content", [None, b"not json", b"{}"])
def test_template_of_another_layout_is_said_in_a_sentence(tmp_path: Path, content: bytes | None) -> None:
    template(tmp_path, content)
    agent = SnapshotAgent(tmp_path, "127.0.0.1")
    agent.take(3)
    with pytest.raises(AgentError, match=r"template\.json: .* it has no agent for slot 3: "):
        agent.ensure()


def test_gather_with_template_of_another_layout_returns_the_reason(tmp_path: Path) -> None:
    template(tmp_path)
    agents = NodeAgents(tmp_path, "127.0.0.1", "node")
    agents.present.take(0)
    result = agents.gather([2], former=False, still_needed=lambda: True, deadline=1.0)
    assert isinstance(result, str)
    assert "no agent for slot 2" in result
