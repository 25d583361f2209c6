"""How fast a step is under each engine, and what a snapshot after every step costs it.

    python -m tests.bench.engines [--rounds 3] [--steps 3] [--quick] [--layouts 1x1x2 2x1x1 1x2x1]

The same model (7M parameters), batches and learning rate for all engines, 2,048 tokens a step, two ranks. In every
round each engine trains a block of steps without snapshots and one with a snapshot after every step, in the same two
processes and in an order that rotates; the first step of a block is not counted, and a block begins when nothing of
another is under way. `blocked` is the time of a step in which the training process waits for its snapshot: the call,
the join before the update and the wait for a free slot. Each rank is a node that mirrors the other; under tensor
parallelism they are one node, without a mirror. Medians over the steps of one run; prints one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from keepwarm.parallel.engine_registry import ENGINES
from keepwarm.trainer.distributed.world import join
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.loop.build import build
from keepwarm.trainer.loop.callback import Run
from keepwarm.trainer.monitor.goodput import Timeline
from tests.bench.snapshot import Nothing, Ours, block
from tests.support.ranks import ROOT

LAYOUTS = ("1x1x2", "2x1x1", "1x2x1")
"""Tensor x pipeline x data."""
SIZES = {
    "full": (
        "model={layers: 6, hidden_size: 256, heads: 8, ffn_size: 688, vocabulary_size: 4096, max_sequence_length: 256}",
        "data.sequence_length=256",
    ),
    "quick": ("data.sequence_length=64",),
}
JOB = ("batch={global_batch_size: 8, micro_batch_size: 2}", "stages.0.tokens=100_000_000", "log.tensorboard=false")


def job_of(engine: str, layout: str, size: str, output: Path) -> Any:
    tensor, pipeline, data = map(int, layout.split("x"))
    nodes = 1 if tensor > 1 else 2
    code = "" if nodes == 1 else ", code: {data: 1, parity: 1}"
    return load_job(
        ROOT / "configs" / "ci" / "tiny.yaml",
        [
            *SIZES[size],
            *JOB,
            f"parallel={{engine: {engine}, tensor: {tensor}, pipeline: {pipeline}, data: {data}}}",
            f"cluster.ranks_per_node={2 // nodes}",
            f"snapshot={{every: 1, scrub: null{code}}}",
            f"output={output}",
        ],
    )


def rank(folder: Path, layout: str, size: str, rounds: int, steps: int) -> None:
    """One of the two ranks; rank 0 leaves the times in `folder`."""
    jobs = {engine: job_of(engine, layout, size, folder / engine) for engine in ENGINES.names()}
    world = join(2, jobs["torch"].numerics)
    runs: dict[str, Run] = {}
    for engine, job in jobs.items():
        (folder / engine).mkdir(exist_ok=True)
        world.barrier()
        timeline = Timeline(folder / engine, rank=world.rank, began=time.time(), restart=False, fresh=True)
        runs[engine] = build(job, world, start="fresh", timeline=timeline)
    turns: dict[tuple[str, str], Nothing] = {}
    for engine, run in runs.items():
        turns[engine, "without"], turns[engine, "with"] = Nothing(run, folder), Ours(run, folder)
    for contestant in turns.values():  # memory is touched for the first time
        block(contestant, 1)
    times: dict[str, dict[str, list[tuple[float, float]]]] = {engine: {"without": [], "with": []} for engine in runs}
    keys = list(turns)
    for turn in range(rounds):
        shift = turn % len(keys)
        for engine, kind in keys[shift:] + keys[:shift]:
            times[engine][kind] += block(turns[engine, kind], steps)
    if world.rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
    for run in runs.values():
        run.callbacks.close(run, "stopped")
        run.loader.close()
        run.engine.close()
    world.leave()


def on_two_ranks(layout: str, size: str, rounds: int, steps: int) -> dict[str, Any]:
    """Each engine's medians in one layout."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="kw-") as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        numbers = ["--rounds", str(rounds), "--steps", str(steps), *(["--quick"] if size == "quick" else [])]
        command = [*launcher, "-m", "tests.bench.engines", *numbers, "--rank-of", layout, folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        times = json.loads((Path(folder) / "times.json").read_text())
        job = job_of("torch", layout, size, Path(folder) / "torch")
    tokens = job.batch.global_batch_size * job.data.sequence_length
    plain = {engine: statistics.median(seconds for seconds, _ in kinds["without"]) for engine, kinds in times.items()}
    found = {engine: _summary(kinds, tokens, plain["torch"]) for engine, kinds in times.items()}
    return {"load_before": load, "load_after": os.getloadavg()[0], "tokens_per_step": tokens, "engines": found}


def _summary(kinds: dict[str, list[tuple[float, float]]], tokens: int, torch_seconds: float) -> dict[str, Any]:
    without, with_ = (statistics.median(seconds for seconds, _ in kinds[kind]) for kind in ("without", "with"))
    blocked = statistics.median(blocked for _, blocked in kinds["with"])
    return {
        "steps_measured": len(kinds["without"]),
        "step_seconds_median": round(without, 4),
        "tokens_per_second": round(tokens / without),
        "step_over_torch": round(without / torch_seconds, 3),
        "snapshot": {
            "step_seconds_median": round(with_, 4),
            "step_over_without": round(with_ / without, 3),
            "blocked_seconds_median": round(blocked, 6),
            "blocked_over_step": round(blocked / without, 5),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured in each block")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--quick", action="store_true", help="a model of 100k parameters: shows that it runs, no more")
    parser.add_argument("--rank-of", nargs=2, metavar=("LAYOUT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = "quick" if options.quick else "full"
    if options.rank_of:
        layout, folder = options.rank_of
        rank(Path(folder), layout, size, options.rounds, options.steps)
        return
    found = {layout: on_two_ranks(layout, size, options.rounds, options.steps) for layout in options.layouts}
    print(json.dumps({"cpus": os.cpu_count(), "torch": torch.__version__, **found}, indent=2))


if __name__ == "__main__":
    main()
