"""Real drills: processes die, memory rots, and the run ends as if nothing had happened."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.runs.drill_campaign import FOUR_NODES, MARK, ONE_RANK_A_NODE, campaign, drill

TWO_NODES = ("parallel.data=2", "cluster.ranks_per_node=1", "snapshot={every: 1, bucket: 65536}")
pytestmark = [pytest.mark.dist, pytest.mark.timeout(3600)]


def assert_survived(found: dict[str, Any], levels: Sequence[str | None]) -> None:
    assert found["bitwise_equal"], found["differences"]
    assert found["residue"] == []
    assert [fault["level"] for fault in found["faults"]] == list(levels)
    # With a snapshot of every step: the one under way, and one that was not committed.
    restored = [fault for fault in found["faults"] if fault["level"] in ("local", "decoded")]
    assert all(fault["steps_lost"] <= 2 for fault in restored), found
    assert all(fault["total_s"] > 0 for fault in found["faults"] if fault["level"])
    assert sum(found["goodput"]["seconds"].values()) == pytest.approx(found["goodput"]["wall_s"])


def carriers() -> list[int]:
    """Processes that a drill of these tests has started and that still run; others may run drills at the same time."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get(MARK) == str(os.getpid())
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all drills of this module: the uninterrupted run of a job is made once."""
    return tmp_path_factory.mktemp("drills")


@pytest.mark.ci
def test_drill_worker_node_and_rotten_memory_recovers_bitwise(folder: Path) -> None:
    faults = ["--kill", "worker:1@4", "--kill", "node:1@8", "--corrupt", "chunk:0@14"]
    page = folder / "drill.html"
    found = drill(folder / "two", "ci/tiny", *TWO_NODES, *faults, "--html", str(page))
    assert [fault["fault"] for fault in found["faults"]] == ["kill worker:1@4", "kill node:1@8", "corrupt chunk:0@14"]
    assert_survived(found, ["local", "decoded", "decoded"])
    assert found["goodput"]["restarts"] == 3
    assert "corrupt chunk:0@14" in page.read_text()
    events = map(json.loads, (folder / "two" / "faults" / "events.jsonl").read_text().splitlines())
    decoded = [event["bytes_decoded"] for event in events if event["event"] == "recovery"]
    assert decoded[0] == 0
    assert all(count > 0 for count in decoded[1:])
    assert carriers() == []


def test_drill_ranks_of_one_launcher_recover_bitwise(folder: Path) -> None:
    snapshot = "snapshot={every: 1, bucket: 65536}"
    found = drill(
        folder / "one", "ci/tiny", "parallel.data=2", snapshot, "--kill", "worker:1@5", "--kill", "worker:0@12"
    )
    assert_survived(found, ["local", "local"])
    assert carriers() == []


CODES = ("{data: 2, parity: 2}", "{data: 3, parity: 1}")


@pytest.mark.long
@pytest.mark.parametrize("code", CODES)
def test_drill_every_single_node_is_decoded(folder: Path, code: str) -> None:
    kills = [f"node:{slot}@{3 + 5 * slot}" for slot in range(4)]
    found = drill(folder / "four", FOUR_NODES, f"snapshot.code={code}", *options("--kill", kills))
    assert_survived(found, ["decoded"] * 4)


@pytest.mark.long
@pytest.mark.parametrize("pairs", [((0, 1), (2, 3), (0, 2)), ((1, 3), (0, 3), (1, 2))], ids=str)
@pytest.mark.parametrize("at_once", [True, False])
def test_drill_every_pair_of_nodes_is_decoded(folder: Path, pairs: Sequence[tuple[int, int]], at_once: bool) -> None:
    """At once, and one after the other: the second in the recovery from the first."""
    kills = []
    for step, (one, other) in zip((3, 10, 17), pairs, strict=True):
        kills += [f"nodes:{one},{other}@{step}"] if at_once else [f"node:{one}@{step}", f"node:{other}@{step}+1"]
    found = drill(folder / "four", FOUR_NODES, *options("--kill", kills))
    assert_survived(found, ["decoded"] * len(kills))


def options(name: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (name, value)]


@pytest.mark.long
def test_drill_more_nodes_than_parity_restore_from_disk(folder: Path) -> None:
    found = drill(folder / "four", FOUR_NODES, "snapshot.code={data: 3, parity: 1}", "--kill", "nodes:1,2@10")
    assert found["bitwise_equal"], found["differences"]
    assert [fault["level"] for fault in found["faults"]] == ["disk"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "levels"),
    [
        (["--kill", "worker:2@8", "--kill", "node:3@8"], ["decoded", "decoded"]),
        (["--kill", "agent:1@8"], [None]),
        (["--kill", "agents:0,1,2,3@8"], [None]),
        (["--kill", "agents:0,1,2,3@8", "--kill", "worker:1@8"], ["local", "local"]),
        (["--kill", "keeper:1@8"], [None]),
        (["--kill", "supervisor:2@8"], ["decoded"]),
        (["--kill", "store@8"], ["local"]),
        (["--kill", "store@8", "--kill", "node:1@8"], ["decoded", "decoded"]),
        (["--kill", "node:1@8", "--kill", "node:1@8+1"], ["decoded", "decoded"]),
        (["--freeze", "node:1@8"], ["decoded"]),
        (["--stop", "disk@8"], [None]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_drill_faults_of_one_kind_and_combined_recover(
    folder: Path, arguments: list[str], levels: list[str | None]
) -> None:
    assert_survived(drill(folder / "four", FOUR_NODES, *arguments), levels)


def test_drill_fault_that_would_come_after_the_end_strikes_before_it(folder: Path) -> None:
    faults = ["--kill", "keeper:1@8", "--kill", "worker:3@8+600"]
    found = drill(folder / "late", FOUR_NODES, "stages.0.tokens=6_144", *ONE_RANK_A_NODE, *faults)
    assert found["faults"][1]["level"] in ("local", "decoded")
    assert found["bitwise_equal"], found["differences"]
    assert found["residue"] == []


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200))
def test_drill_drawn_campaigns_recover(folder: Path, seed: int) -> None:
    campaign(folder / "drawn", seed)


@pytest.mark.ci
@pytest.mark.parametrize("seed", range(20))
def test_drill_drawn_campaigns_of_four_ranks_recover(folder: Path, seed: int) -> None:
    campaign(folder / "drawn_small", seed, *ONE_RANK_A_NODE)
