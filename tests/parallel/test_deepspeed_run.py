"""A job on the DeepSpeed engine as real processes, one of which is killed."""

import importlib.util
import signal
from pathlib import Path

import pytest

from ft import durable
from tests.trainer.test_run import (
    IN_MEMORY,
    TINY,
    TWO_RANKS,
    assert_no_agents,
    disturbed,
    events_of,
    keepwarm,
    rank_1_of,
    run,
    steps_of,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install 'keepwarm[deepspeed]'",
    ),
    pytest.mark.dist,
    pytest.mark.long,
    pytest.mark.timeout(900),
]


def pieces_of(folder: Path) -> dict[object, str]:
    """Checksum of every stored piece of the newest checkpoint; ZeRO cuts tensors into flat ranges."""
    newest = durable.latest(folder / "checkpoints")
    assert newest is not None
    entries = [entry for part in durable.verify(newest).parts for entry in part.entries]
    return {(entry.piece.name, entry.piece.offsets, entry.piece.flat): entry.xxh3 for entry in entries}


def test_a_killed_worker_is_restarted_from_memory(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    job = [str(TINY), "parallel.engine=deepspeed", *TWO_RANKS]
    done = run(keepwarm(*job, f"output={whole}"))
    assert done.returncode == 0, done.stdout + done.stderr
    code, output = disturbed(keepwarm(*job, f"output={folder}", IN_MEMORY), folder, signal.SIGKILL, rank_1_of)
    assert code == 0, output
    began = [event for event in events_of(folder) if event["event"] == "began"]
    assert [event["source"] for event in began] == ["nothing", "memory"]
    assert began[1]["step"] >= 1
    assert steps_of(folder) == steps_of(whole)
    assert pieces_of(folder) == pieces_of(whole)
    assert_no_agents(folder)
