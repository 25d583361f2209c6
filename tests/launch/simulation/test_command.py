"""keepwarm simulate from the outside: what it reads, what it prints, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.command import main
from keepwarm.launch.simulation.drill import apply_drill
from keepwarm.launch.simulation.durations import duration, seconds
from keepwarm.launch.simulation.failures import Kind, load_trace
from keepwarm.launch.simulation.scheme import Restart, Times

QUICK = ("--gpus", "64", "--mtbf", "1h", "--duration", "2d", "--trials", "2", "--code", "2,2")
TIMES = Times(stall=0.01, worker=Restart(1, 1), node=Restart(5, 25), durable=Restart(5, 595))


def simulate(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def as_json(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(simulate(*arguments, "--json", capsys=capsys))


def test_simulate_same_command_prints_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (simulate(*QUICK, "--rack-share", "0.1", "--json", capsys=capsys) for _ in range(2))
    assert first == second
    assert first != simulate(*QUICK, "--rack-share", "0.1", "--json", "--seed", "1", capsys=capsys)


def test_simulate_tables_name_schemes_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    text = simulate(*QUICK, "--target-goodput", "0.9", capsys=capsys)
    for name in ("code (2, 2)", "2 replicas", "3 replicas", "disk", "recommended: code ("):
        assert name in text
    assert "64 GPUs on 8 nodes in racks of 8" in text
    assert "a failure every 60 m on average, exponential" in text
    assert "\x1b" not in text  # plain where it is not a terminal


def test_simulate_one_node_to_100_000_gpus_scales(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json("--gpus", "8,64,100000", "--rack-share", "0.02", "--duration", "3d", "--trials", "2", capsys=capsys)
    one, small, large = found["sizes"]
    assert [size["nodes"] for size in found["sizes"]] == [1, 8, 12500]
    assert one["schemes"][0]["scheme"] == "one node"
    assert [scheme["memory"] for scheme in small["schemes"]] == [1 / 3, 1, 2, 0]  # one group of eight
    assert large["mtbf_s"] == pytest.approx(one["mtbf_s"] / 12500)
    goodputs = [size["schemes"][0]["goodput"] for size in (small, large)]
    assert goodputs[0] > goodputs[1] > 0.9


def test_simulate_plot_writes_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    simulate("--gpus", "64,512", "--duration", "2d", "--trials", "2", "--plot", str(folder), capsys=capsys)
    assert {path.name for path in folder.iterdir()} == {"waste-64.png", "waste-512.png", "goodput.png", "losses.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_simulate_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(3600, "node", 0), (3605, "node", 4), (9000, "worker", 1), (20000, "rack", ""), (86400, "", "")]
    table = tmp_path / "failures.csv"
    table.write_text("time_s,kind,node\n" + "".join(f"{time},{kind},{node}\n" for time, kind, node in rows))
    listed = tmp_path / "failures.json"
    objects = [
        {"time_s": time, "kind": kind or "node"} | ({"node": node} if node != "" else {}) for time, kind, node in rows
    ]
    listed.write_text(json.dumps(objects))
    trace = load_trace(table)
    assert trace.kinds.tolist() == [Kind.NODE, Kind.NODE, Kind.WORKER, Kind.RACK, Kind.NODE]
    common = ("--gpus", "64", "--code", "1,1", "--rack", "1", "--trials", "2", "--spares", "9")
    found = as_json(*common, "--trace", str(table), capsys=capsys)
    assert found == as_json(*common, "--trace", str(listed), capsys=capsys)
    (size,) = found["sizes"]
    assert size["horizon_s"] == 86400
    pairs = size["schemes"][0]
    # Groups of 64 GPUs under (1, 1): nodes 0 and 4 keep each other's state, and die five seconds apart.
    assert pairs["losses_by"] == "simulated"
    assert pairs["losses"] == 1
    assert pairs["failures"] == 4  # the fifth comes at the end


def drill(tmp_path: Path, **changes: Any) -> Path:
    phases = {
        "detect": 1.0,
        "rendezvous": 0.5,
        "start": 0.25,
        "fetch": 2.0,
        "decode": 1.0,
        "verify": 0.25,
        "resume": 1.0,
    }
    faults = [
        {
            "fault": "worker:1@20",
            "level": "local",
            "steps_lost": 1,
            "seconds": {"detect": 0.25, "resume": 0.5},
            "total_s": 0.75,
        },
        {"fault": "node:2@35", "level": "decoded", "steps_lost": 1, "seconds": phases, "total_s": 6.0},
        {"fault": "stop disk@70", "level": None, "steps_lost": 0, "seconds": {}, "total_s": 0.0},
    ]
    path = tmp_path / "drill.json"
    path.write_text(json.dumps({"bitwise_equal": True, "faults": faults} | changes))
    return path


def test_apply_drill_sets_detection_and_recovery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = drill(tmp_path)
    assert apply_drill(TIMES, path) == Times(
        stall=0.01, worker=Restart(0.25, 0.5), node=Restart(1.0, 5.0), durable=TIMES.durable
    )
    # Ten times the state: fetch, decode and verify take ten times as long.
    assert apply_drill(TIMES, path, 10.0).node == Restart(1.0, 5.0 + 9 * 3.25)
    (size,) = as_json(*QUICK, "--drill", str(path), capsys=capsys)["sizes"]
    assert (size["schemes"][0]["detection_s"], size["schemes"][0]["recovery_s"]) == (1.0, 5.0)
    assert size["schemes"][-1]["recovery_s"] == 595.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bitwise_equal": False}, "did not end bitwise equal"),
        ({"faults": []}, "no fault was recovered from"),
        ({"faults": 3}, "expected what `keepwarm drill --json` prints"),
        ({"faults": [{"fault": "a", "level": "two", "seconds": {}}]}, "fault 1: level is 'two', expected one of local"),
        ({"faults": [{"fault": "a", "rung": 2, "seconds": {}}]}, "fault 1: `rung` is now `level`"),
        (
            {"faults": [{"fault": "a", "level": "decoded", "seconds": {"detect": "x"}}]},
            "fault 1: expected seconds by phase",
        ),
    ],
)
def test_apply_drill_empty_drill_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        apply_drill(TIMES, drill(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "when\n3\n", "failure 1: unknown key 'when'"),
        ("t.csv", "time_s,node\nx,1\n", "failure 1: time_s is 'x', not a number"),
        ("t.csv", "time_s\n1\n-1\n", "failure 2: time_s = -1"),
        ("t.csv", "time_s\n", "the trace has no failure"),
        ("t.json", "{", "not a CSV or JSON file"),
        ("t.json", '{"time_s": 1}', "expected a list of failures, found dict"),
        ("t.json", '[{"time_s": 1, "kind": "gpu"}]', "failure 1: kind is 'gpu'"),
        ("t.json", "[1]", "failure 1: expected an object"),
    ],
)
def test_load_trace_bad_row_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SimulationError, match=message):
        load_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "12"), r"--gpus 12: must be a multiple of the 8 GPUs of a node"),
        (("--gpus", "100008"), r"up to 100,000"),
        (("--gpus", "many"), r"'many' is not a number"),
        (("--gpus", "32", "--code", "6,2"), r"needs groups of k \+ m = 6 \+ 2 = 8 nodes, there are 4"),
        (("--code", "6"), r"--code '6': write k,m"),
        (("--mtbf", "soon"), r"--mtbf = 'soon': write a number and a unit"),
        (("--mtbf", "0s"), r"--mtbf = 0s: must be above 0"),
        (("--mtbf", "1h", "--node-mtbf", "1y"), r"--mtbf is that of the whole cluster"),
        (("--mtbf", "1h", "--gpus", "64,512"), r"for several sizes give --node-mtbf"),
        (("--mtbf", "1s"), r"too many nodes are in repair at once"),
        (("--mtbf", "1ms", "--spares", "1"), r"failures are more than can be simulated"),
        (("--rack-share", "0.7", "--worker-share", "0.7"), r"must not be negative nor exceed 1 together"),
        (("--weibull", "0"), r"Weibull shape is 0\.0"),
        (("--recovery", "1s"), r"--recovery = 1s contains the detection, which takes 5 s alone"),
        (("--spares", "some"), r"--spares 'some': must be auto or a number"),
        (("--target-goodput", "0.99999"), r"a goodput of 100\.00% is out of reach"),
        (("--trace", "nowhere.csv"), r"nowhere.csv: No such file"),
        (("--drill", "nowhere.json"), r"nowhere.json: No such file"),
    ],
)
def test_simulate_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SimulationError, match=message) as raised:
        main([*arguments, "--duration", "1d", "--trials", "2"])
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_simulate_bad_input_exits_2_with_message_on_stderr() -> None:
    command = [sys.executable, "-c", "from keepwarm.launch.cli.main import main; main()", "simulate", "--gpus", "12"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3], check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("keepwarm: --gpus 12: must be")
    assert ended.stderr.count("\n") == 1


def test_simulate_imports_no_torch() -> None:
    program = "import sys, keepwarm.launch.simulation.command, keepwarm.launch.simulation.report; "
    program += "sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], timeout=60, cwd=Path(__file__).parents[3], check=False
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("text", "value"), [("10ms", 0.01), ("30s", 30), ("30", 30), ("3.1h", 11160), ("54d", 4665600), (" 1e3 s ", 1000)]
)
def test_seconds_parses_durations(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


def test_duration_formats_seconds() -> None:
    assert [duration(s) for s in (0, 0.0149, 14.94, 818.2, 11160, 54 * 86400, float("inf"))] == [
        "0 ms",
        "14.9 ms",
        "14.9 s",
        "13.6 m",
        "3.1 h",
        "54 d",
        "never",
    ]
