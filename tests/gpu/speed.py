"""Time, MFU, memory and the cost of snapshots of models of 1B and 8B parameters."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from keepwarm.ft.memory.shared_memory import available_memory
from keepwarm.launch.plan.plan import Plan
from keepwarm.trainer.job.estimate import RESERVED_GIB, estimate_rank, model_flops_per_token
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.loop.session import run_session
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.speed import Speed
from tests.gpu.rows import GIB, TINY, row

WARM = 2
"""Steps that are not measured: the first ones compile and allocate."""


@dataclass(frozen=True)
class Room:
    """Bytes that are free."""

    gpu: float
    host: float
    disk: float

    def holds(self, plan: Plan) -> bool:
        """Return whether state, snapshots and the checkpoint at the end fit, the last one with time to write it."""
        snapshots = plan.host_memory
        return (
            plan.estimates[0].total < self.gpu - RESERVED_GIB * GIB
            and (snapshots is None or snapshots.total < 0.8 * self.host)
            and plan.checkpoint_bytes < 0.4 * self.disk
        )


def one_billion(device: torch.device, folder: Path) -> None:
    """Train Llama 3.2 1B."""
    _measure(device, folder, "llama-3.2-1b", length=4096, batch=8, micro=4, steps=12)


def eight_billion(device: torch.device, folder: Path) -> None:
    """Train as many layers of Llama 3 8B as the GPU, the host's memory and its disk hold."""
    _measure(device, folder, "llama-3-8b", length=8192, batch=4, micro=1, steps=8)


def _measure(
    device: torch.device, folder: Path, model: str, *, length: int, batch: int, micro: int, steps: int
) -> None:
    on_gpu = device.type != "cpu"
    if not on_gpu:
        model, length, steps = "tiny", 64, 6
    overrides = [
        f"model={model}", f"cluster.device={device.type}", f"output={folder / 'run'}", "log.tensorboard=false",
        f"data.sequence_length={length}", f"batch.global_batch_size={batch}", f"batch.micro_batch_size={micro}",
        f"stages.0.tokens={steps * batch * length}", "numerics.precision=bf16", f"evaluation.samples={batch}",
        f"numerics.compile={str(on_gpu and _compiler()).lower()}", "snapshot.every=2",
        f"numerics.threads_per_rank={min(8, os.cpu_count() or 1) if on_gpu else 1}",
        "stages.0.lr.max=1e-4", "stages.0.lr.min=1e-5",
    ]  # fmt: skip
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else available_memory()
    overrides += _deepest(overrides, Room(memory, available_memory(), shutil.disk_usage(folder).free))
    job = load_job(TINY, overrides)
    if on_gpu:
        torch.accelerator.reset_peak_memory_stats()
    run_session(TINY, overrides, resume=False)
    name = f"{model}, {job.model.layers} layers{', compiled' if job.numerics.compile else ''}"
    _rows(job, name, device, folder / "run")


def _compiler() -> bool:
    """Return whether torch can compile for a GPU: Triton builds its launchers with the C compiler."""
    return any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


def _deepest(overrides: list[str], room: Room) -> list[str]:
    """Return the overrides for the deepest model, of its own depth at most, that the plan says has room."""
    gpu = f"cluster.gpu_memory={room.gpu / GIB:.0f}"
    for layers in range(load_job(TINY, overrides).model.layers, 1, -1):
        chosen = [f"model.layers={layers}", gpu]
        if room.holds(Plan(load_job(TINY, [*overrides, *chosen]))):
            return chosen
    return ["model.layers=1"]


def _rows(job: JobSpec, name: str, device: torch.device, output: Path) -> None:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_time_s"] for line in lines if "step_time_s" in line][WARM:]
    batch, length = job.batch.global_batch_size, job.data.sequence_length
    rate = batch * length / median(seconds)
    row(f"{name}: a step of {batch} x {length} tokens", f"{median(seconds):.3f} s, {rate:.0f} tokens/s")
    if device.type != "cpu":
        mfu = Speed.of(model_flops_per_token(job.model, length), ranks=1, device=device).mfu(rate)
        row(f"{name}: MFU", "the card's peak is unknown" if mfu is None else f"{mfu:.1%}")
        planned, peak = estimate_rank(job, 0).total, torch.accelerator.max_memory_allocated()
        row(f"{name}: peak memory, and as planned", f"{peak / GIB:.1f} GiB, {planned / GIB:.1f} GiB")
    # A snapshot of an even step is copied during the next one.
    during, without = median(seconds[::2]), median(seconds[1::2])
    row(f"{name}: a step beside a snapshot's copy, and one without", f"{during:.3f} s, {without:.3f} s")
    (taken,) = events.read(output).of(events.Snapshots)
    row(
        f"{name}: snapshots of {taken.bytes / GIB:.2f} GiB",
        f"{taken.taken} taken, {taken.skipped} skipped; the last copy took {taken.last_copy_s:.2f} s; "
        f"training waited {taken.blocked_s:.2f} s for all",
    )
