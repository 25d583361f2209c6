"""What a snapshot after every step costs the training, against `dcp.async_save` and `torch.save` to shared memory.

    python -m tests.bench.snapshot [--rounds 3] [--steps 4] [--quick]

15.5M parameters, 4,096 tokens a step, two nodes of one rank, each the other's mirror, on CPU. In every round each
contestant trains a block of steps in the same two processes on the same engine, in an order that rotates, and keeps
the same bytes after every step: the share of the state that each rank stores in a snapshot. The first step of a block
is not counted, and a block begins when nothing of another is under way. `blocked` is the time in which the training
process can do nothing else: of ours the call, the join before the update and the wait for a free slot; of async_save
the call and the wait for the previous save; of torch.save the call. Medians of rank 0; prints one JSON object.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from keepwarm.ft.worker.in_memory import InMemoryCheckpointer
from keepwarm.ft.worker.snapshotter import _bytes_of
from keepwarm.trainer.distributed.world import join
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.loop.build import build
from keepwarm.trainer.loop.callback import Run
from keepwarm.trainer.loop.snapshots import Snapshots
from keepwarm.trainer.monitor.goodput import Timeline
from tests.support.ft.nodes import wait_committed
from tests.support.ranks import ROOT

SIZES = {
    "full": (
        "model={layers: 7, hidden_size: 384, heads: 6, ffn_size: 1024, vocabulary_size: 4096, "
        "max_sequence_length: 256}",
        "data.sequence_length=256",
        "batch={global_batch_size: 16, micro_batch_size: 8}",
    ),
    "quick": ("data.sequence_length=64", "batch={global_batch_size: 8, micro_batch_size: 4}"),
}
JOB = (
    "parallel.data=2",
    "cluster.ranks_per_node=1",
    "snapshot={every: 1, code: {data: 1, parity: 1}, scrub: null}",
    "stages.0.tokens=100_000_000",
    "log.tensorboard=false",
)


def checkpointer_of(run: Run) -> InMemoryCheckpointer:
    return next(one.checkpointer for one in run.callbacks if isinstance(one, Snapshots))


class Nothing:
    """Trains on without keeping anything; what the others do differently."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder, self.blocked = run, folder, 0.0
        self.checkpointer = checkpointer_of(run)
        self.snapshotter = self.checkpointer._snapshotter
        pieces = [(piece, self.snapshotter.state[piece.name]) for piece, _ in self.snapshotter.plan.entries]
        rank = run.world.rank
        self.state = {f"{rank}/{piece.name}": torch.from_numpy(_bytes_of(shard, piece)) for piece, shard in pieces}

    def before_update(self) -> None:
        return

    def after_step(self, seconds: float) -> None:
        return

    def finish(self) -> None:
        """Returns when nothing is under way any more."""


class Ours(Nothing):
    def before_update(self) -> None:
        began = time.perf_counter()
        self.checkpointer.join()
        self.blocked += time.perf_counter() - began

    def after_step(self, seconds: float) -> None:
        began = time.perf_counter()
        self.checkpointer.maybe_snapshot(self.run.state.step, lambda: json.dumps(self.run.meta()).encode(), seconds)
        self.blocked += time.perf_counter() - began
        if self.checkpointer.last_error is not None:
            raise RuntimeError(self.checkpointer.last_error)

    def finish(self) -> None:
        self.before_update()
        if self.snapshotter.sealed is not None:
            wait_committed(self.snapshotter)


class AsyncSave(Nothing):
    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__(run, folder)
        self.group = dist.new_group(backend="gloo")  # its thread must not meet the collectives of the step
        self.saving: Any = None

    def after_step(self, seconds: float) -> None:
        began = time.perf_counter()
        self.finish()
        self.saving = dcp.async_save(self.state, checkpoint_id=self.folder / "dcp", process_group=self.group)
        self.blocked += time.perf_counter() - began

    def finish(self) -> None:
        if self.saving is not None:
            self.saving.result()
            self.saving = None


class TorchSave(Nothing):
    def after_step(self, seconds: float) -> None:
        began = time.perf_counter()
        torch.save(self.state, self.folder / f"{self.run.world.rank}.pt")
        self.blocked += time.perf_counter() - began


CONTESTANTS: dict[str, type[Nothing]] = {
    "nothing": Nothing,
    "snapshot": Ours,
    "async_save": AsyncSave,
    "torch_save": TorchSave,
}


def block(contestant: Nothing, steps: int) -> list[tuple[float, float]]:
    """Seconds of each step after the first, and of them those blocked."""
    run, measured = contestant.run, []
    run.world.barrier()
    for _ in range(steps + 1):
        contestant.blocked, began = 0.0, time.perf_counter()
        run.engine.step(run.loader.next_batch(), 1e-4, contestant.before_update)
        run.state.step += 1
        contestant.after_step(time.perf_counter() - began)
        measured.append((time.perf_counter() - began, contestant.blocked))
    contestant.finish()
    run.world.barrier()
    return measured[1:]


def rank(folder: Path, shared: Path, size: str, rounds: int, steps: int) -> None:
    """One of the two ranks; rank 0 leaves the result in `folder`."""
    tiny = ROOT / "configs" / "ci" / "tiny.yaml"
    job = load_job(tiny, [*SIZES[size], *JOB, f"output={folder / 'run'}"])
    world = join(job.layout.world_size, job.numerics)
    (folder / "run").mkdir(exist_ok=True)
    world.barrier()
    timeline = Timeline(folder / "run", rank=world.rank, began=time.time(), restart=False, fresh=True)
    run = build(job, world, start="fresh", timeline=timeline)
    contestants = {name: make(run, shared) for name, make in CONTESTANTS.items()}
    for contestant in contestants.values():  # memory and files are touched for the first time
        block(contestant, 2)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name] += block(contestants[name], steps)
    if world.rank == 0:
        stored = sum(tensor.numel() for tensor in contestants["nothing"].state.values())
        shapes = {shard.name: shard.global_shape for shard in run.engine.state().values()}
        parameters = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("model."))
        commits = checkpointer_of(run).commit_seconds
        result = {
            "parameters": parameters,
            "tokens_per_step": job.batch.global_batch_size * job.data.sequence_length,
            "bytes_stored_by_a_rank": stored,
            "commit_seconds_median": round(statistics.median(commits), 4),
            "times": times,
        }
        (folder / "result.json").write_text(json.dumps(result))
    run.callbacks.close(run, "stopped")
    run.loader.close()
    run.engine.close()
    world.leave()


def summary(result: dict[str, Any]) -> dict[str, Any]:
    times = result.pop("times")
    step = {name: statistics.median(seconds for seconds, _ in values) for name, values in times.items()}
    blocked = {name: statistics.median(seconds for _, seconds in values) for name, values in times.items()}
    ours = blocked["snapshot"]
    return {
        **result,
        "steps_measured": len(times["nothing"]),
        "step_seconds_median": {name: round(value, 4) for name, value in step.items()},
        "step_over_nothing": {name: round(value / step["nothing"], 4) for name, value in step.items()},
        "wanted_step_over_nothing": "snapshot at most 1.10",
        "blocked_seconds_median": {name: round(value, 6) for name, value in blocked.items() if name != "nothing"},
        "blocked_over_ours": {name: round(blocked[name] / ours, 2) for name in ("async_save", "torch_save")},
        "wanted_blocked_over_ours": "at least 5",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured in each block")
    parser.add_argument("--quick", action="store_true", help="a model of 100k parameters: shows that it runs, no more")
    parser.add_argument("--folders", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = "quick" if options.quick else "full"
    if options.folders:
        rank(*options.folders, size, options.rounds, options.steps)
        return
    load = os.getloadavg()[0]
    shared = Path(tempfile.mkdtemp(prefix="keepwarm-bench-", dir="/dev/shm"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [*launcher, "-m", "tests.bench.snapshot", *sys.argv[1:], "--folders", folder, str(shared)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
            result = json.loads((Path(folder) / "result.json").read_text())
    finally:
        shutil.rmtree(shared)
    print(json.dumps({"cpus": os.cpu_count(), "load_before": load, **summary(result)}, indent=2))


if __name__ == "__main__":
    main()
