"""keepwarm snapshots from the outside, asking real agents."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from keepwarm.ft.discovery.config import DurableConfig, runtime_folder
from keepwarm.ft.transport.auth import run_identity
from tests.support.ft.nodes import Nodes, random_state, together, wait_committed

ROOT = Path(__file__).parents[3]


def snapshots(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "keepwarm", "snapshots", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


class Run(Nodes):
    """Agents where those of a run in `folder` are."""

    def __init__(self, folder: Path) -> None:
        durable = DurableConfig(root=str(folder / "checkpoints"))
        super().__init__(folder, 2, groups=[((0, 1), 1)], durable=durable)
        self.run = run_identity(self.secret)
        self.configs = [
            msgspec.structs.replace(config, run=self.run, folder=str(runtime_folder(self.run, config.slot)))
            for config in self.configs
        ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="keepwarm-") as short:  # the name of a socket holds 107 bytes at most
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        world = Run(tmp_path)
        try:
            world.start_all()
            yield world
        finally:
            world.close()


def test_snapshots_shows_what_agents_hold(run: Run) -> None:
    snapshotters = run.snapshotters([random_state(rank, 2) for rank in range(2)])
    together(lambda each: each.restore(1), snapshotters)
    for step in (5, 6):
        for each in snapshotters:
            each.offer(step, b"meta")
        for each in snapshotters:
            each.join()
            wait_committed(each, 30.0)

    done = snapshots(str(run.folder), "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["silent"] == {}
    assert [agent["slot"] for agent in shown["agents"]] == [0, 1]
    for slot, agent in enumerate(shown["agents"]):
        assert agent["pid"] == run.pids[slot]
        assert (agent["group"], agent["parity"], agent["workers"]) == ([0, 1], 1, [0])
        # 2 S (1 + m/k) + S with the durable tier, k = m = 1.
        assert agent["memory_bytes"] == 5 * agent["buffer_bytes"]
        newest = agent["held"][-1]
        assert (newest["step"], newest["phase"]) == (6, "committed")
        assert sorted(newest["chunks"]) == ["0", "1"]
        assert [commit["step"] for commit in agent["commits"]] == [5, 6]
    digests = {digest for agent in shown["agents"] for digest in agent["held"][-1]["chunks"].values()}
    assert len(digests) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)

    done = snapshots(str(run.folder))
    assert done.returncode == 0, done.stderr
    assert "2 of its agents on this machine" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    for slot, agent in enumerate(shown["agents"]):
        assert [str(slot), str(run.pids[slot]), "1", "active", "0,1", "1"] in [row[:6] for row in rows]
        chunks = agent["held"][-1]["chunks"]
        expected = [f"{stripe}:{digest}" for stripe, digest in chunks.items()]
        assert [row for row in rows if row[:4] == [str(slot), "1", "6", "committed"] and row[-2:] == expected]


def test_snapshots_agent_without_answer_is_named(run: Run) -> None:
    run.kill(1)
    done = snapshots(str(run.folder), "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [agent["slot"] for agent in shown["agents"]] == [0]
    assert "no agent answers" in shown["silent"]["1"]
    run.kill(0)
    done = snapshots(str(run.folder))
    assert done.returncode == 2
    assert "no agent of this run is running on this machine" in done.stderr
    assert "Traceback" not in done.stderr


def test_snapshots_folder_without_snapshots_is_refused(tmp_path: Path) -> None:
    done = snapshots(str(tmp_path))
    assert done.returncode == 2
    assert (
        done.stderr
        == f"keepwarm: {tmp_path}: no run with snapshots has been started in this folder (no file 'secret')\n"
    )
