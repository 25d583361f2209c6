"""From a kill to the next step: a worker, a node with its memory, and a node that freezes.

    python -m tests.bench.recovery [--rounds 10] [--stock-rounds 3]

Trains `configs/ci/drill.yaml`, 4 nodes of 2 ranks on this machine, with a snapshot after every step, and does the same
in every round, by SIGKILL or SIGSTOP. There are as many spares as nodes are lost; a round begins when the redundancy is
back, and silence is a death after one second. `noticed` is when the first supervisor wrote the failure down.
Seconds are those between the kill and the end of the first step after it. The same is then done to stock torchrun with
one spare and a DCP checkpoint after every step. Prints one JSON object.
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from keepwarm.trainer.monitor.events import PHASES
from tests.bench import torchrun
from tests.support.runs.node_run import DEADLINE, ROOT, Run, runs

DRILL = ROOT / "configs" / "ci" / "drill.yaml"
NODES = 4
ENDLESS = (
    "stages.0.tokens=100_000_000", "cluster.max_restarts=1000", "cluster.max_node_failures=1000",
    "evaluation.samples=8", "log.tensorboard=false", "snapshot.peer_timeout=1",
)  # fmt: skip
GOALS = {"worker": 2.0, "node": 4.0, "noticed": 1.5}


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)}


def recoveries(folder: Path, what: str, rounds: int) -> dict[str, Any]:
    """Lose a worker or a node in every round."""
    totals: list[float] = []
    noticed: list[float] = []
    phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
    with runs(folder, DRILL) as start:
        run: Run = start(*ENDLESS, "--nodes", str(NODES), "--spares", str(0 if what == "worker" else rounds))
        run.after(3)
        for count in range(1, rounds + 1):
            slot = count % NODES
            record = run.owner(slot)
            began = time.time()
            everything = [record.supervisor, *filter(None, (record.agent, record.keeper)), *record.workers.values()]
            for pid in everything if what != "worker" else [min(record.workers.values())]:
                os.kill(pid, signal.SIGSTOP if what == "frozen" else signal.SIGKILL)
            event = run.recovered(count)
            assert event["source"] == "memory", event
            totals.append(event["time"] - began)
            noticed.append(next(one["time"] for one in run.events("failure") if one["time"] > began) - began)
            for phase in PHASES:
                phases[phase].append(event["phases"].get(phase, 0.0))
            for pid in everything if what == "frozen" else ():
                os.kill(pid, signal.SIGKILL)
            if what != "worker":
                run.until(lambda count=count: len(run.events("whole")) >= count, "redundancy to be back")
            run.after(event["step"] + 3)
        run.process.send_signal(signal.SIGTERM)
        run.process.wait(DEADLINE)
    return {
        "seconds": summary(totals),
        "noticed": summary(noticed),
        "phases": {phase: summary(values) for phase, values in phases.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stock-rounds", type=int, default=3, help="of torchrun, whose recoveries take long; 0: none")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="keepwarm-bench-", ignore_cleanup_errors=True) as name:
        for what in ("worker", "node", "frozen"):
            (Path(name) / what).mkdir()
            found[what] = recoveries(Path(name) / what, what, options.rounds)
            if options.stock_rounds and what != "frozen":
                (Path(name) / f"{what}_stock").mkdir()
                stock = torchrun.recoveries(Path(name) / f"{what}_stock", what, options.stock_rounds)
                ratio = statistics.median(stock) / found[what]["seconds"]["median"]
                found[what] |= {"torchrun": summary(stock), "times_faster": round(ratio, 1)}
    result = {"cpus": os.cpu_count(), "load_before": load, **found, "goals": GOALS}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
