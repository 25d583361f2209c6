"""What `tests/gpu/run.py` measures on a GPU, one function a part; each prints its rows as JSON as they come.

`python -m tests.gpu.parts PART cuda|cpu` runs one of them; on the CPU with sizes that exercise the code alone.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from keepwarm.trainer.job.estimate import estimate_rank, model_flops_per_token
from keepwarm.trainer.job.files import load_job, shipped_configs
from keepwarm.trainer.loop.session import run_session
from keepwarm.trainer.monitor.speed import Speed
from tests.support.ft.nodes import Nodes, Tensor, nodes, wait_committed
from tests.support.runs.run_contents import steps_of

TINY = shipped_configs() / "ci" / "tiny.yaml"
MIB, GIB = 1 << 20, 1 << 30
STEPS = 6


def row(what: str, value: object, *, passed: bool | None = None) -> None:
    """Print a row. `passed` is None where there is nothing to fail."""
    print(json.dumps({"what": what, "value": str(value), "passed": passed}), flush=True)


def snapshots(device: torch.device, folder: Path) -> None:
    """Copy a state to a real agent and back, with the agent killed in between, and compare the bits."""
    on_gpu = device.type != "cpu"
    size = 8 * GIB if on_gpu else MIB
    bucket = 8 * MIB if on_gpu else 65536
    random = torch.Generator(device).manual_seed(3)
    tensors = [torch.randn(size // 32, generator=random, device=device) for _ in range(8)]
    expected = [one.cpu() for one in tensors]
    state = {f"t{i}": Tensor(f"t{i}", (one.numel(),), (0,), (one.numel(),), one, (0,)) for i, one in enumerate(tensors)}
    with nodes(folder, 1, state_bytes=size + 4 * bucket, bucket_bytes=bucket) as world:
        epoch = 1
        for agent in ("first", "after SIGKILL"):
            _snapshots_of_one_agent(world, state, expected, epoch, f"{agent} agent")
            epoch += 2
            world.crash(0)


def _snapshots_of_one_agent(world: Nodes, state: dict[str, Tensor], expected: Any, epoch: int, agent: str) -> None:
    (made,) = world.snapshotters([state])
    made.restore(epoch)
    for step in (1, 2, 3):
        made.offer(step, b"meta")
        made.join()
        assert made.failure is None, made.failure
        wait_committed(made)
    rate = made.timings.bytes / made.timings.copy / 1e9
    row(f"{agent}: copy and checksums of {made.timings.bytes / GIB:.2f} GiB", f"{rate:.1f} GB/s")
    on_gpu = next(iter(state.values())).local.device.type != "cpu"
    if on_gpu:
        row(f"{agent}: memory is page-locked", made.unlocked or "yes", passed=made.unlocked is None)
    for one in state.values():
        one.local.zero_()
    began = time.perf_counter()
    made.restore(epoch + 1)
    made.join()
    equal = all(torch.equal(one.local.cpu(), want) for one, want in zip(state.values(), expected, strict=True))
    row(f"{agent}: restored to the bit, in {time.perf_counter() - began:.1f} s", equal, passed=equal)
    made.client.close()


def training(device: torch.device, folder: Path) -> None:
    """Train the tiny job twice with the same bits, and near those of the CPU."""
    first, second = (_losses(folder / name, device) for name in ("first", "second"))
    equal = torch.equal(first, second)
    row("losses of two runs are equal to the bit", equal, passed=equal)
    _compare("on this device and on the CPU", first, _losses(folder / "cpu", torch.device("cpu")))


def compiled(device: torch.device, folder: Path) -> None:
    """Train the tiny job with and without compiled layers and masks between documents; on the CPU, twice without."""
    compile_ = f"numerics.compile={str(device.type != 'cpu').lower()}"
    for mask in ("false", "true"):
        more = f"data.document_mask={mask}"
        eager = _losses(folder / f"eager-{mask}", device, more)
        _compare(f"compiled and not, document_mask: {mask}", eager, _losses(folder / mask, device, more, compile_))


def _losses(output: Path, device: torch.device, *overrides: str) -> torch.Tensor:
    small = [
        f"cluster.device={device.type}", f"output={output}", "log.tensorboard=false", "numerics.deterministic=true",
        f"stages.0.tokens={STEPS * 8 * 64}", "evaluation.samples=4",
    ]  # fmt: skip
    run_session(TINY, [*small, *overrides], resume=False)
    return torch.tensor([line["loss"] for line in steps_of(output) if "loss" in line], dtype=torch.float64)


def _compare(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    difference = float((one - other).abs().max())
    row(f"largest difference of losses, {what}", f"{difference:.1e}", passed=difference < 1e-2)


def speed(device: torch.device, folder: Path) -> None:
    """Train a model of 1B parameters for a few steps: time, MFU, and memory against `keepwarm plan`."""
    on_gpu = device.type != "cpu"
    model, length, batch, steps = ("llama-3.2-1b", 4096, 8, 12) if on_gpu else ("tiny", 64, 8, 4)
    overrides = [
        f"model={model}", f"cluster.device={device.type}", f"output={folder / 'run'}", "log.tensorboard=false",
        f"data.sequence_length={length}", f"batch.global_batch_size={batch}", "batch.micro_batch_size=4",
        f"stages.0.tokens={steps * batch * length}", "numerics.precision=bf16",
        f"numerics.compile={str(on_gpu).lower()}", "evaluation.samples=4", "snapshot.every=2",
    ]  # fmt: skip
    job = load_job(TINY, overrides)
    if on_gpu:
        torch.accelerator.reset_peak_memory_stats()
    run_session(TINY, overrides, resume=False)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(line["step_time_s"] for line in lines if "step_time_s" in line)[: steps // 2 + 1][-1]
    rate = batch * length / seconds
    row(f"{model}: a step of {batch} x {length} tokens", f"{seconds:.3f} s, {rate:.0f} tokens/s")
    if on_gpu:
        mfu = Speed.of(model_flops_per_token(job.model, length), ranks=1, device=device).mfu(rate)
        row(f"{model}: MFU", "the card's peak is unknown" if mfu is None else f"{mfu:.1%}")
        planned, peak = estimate_rank(job, 0).total, torch.accelerator.max_memory_allocated()
        row(f"{model}: peak memory, and as planned", f"{peak / GIB:.1f} GiB, {planned / GIB:.1f} GiB")


PARTS: dict[str, Callable[[torch.device, Path], None]] = {
    "snapshots": snapshots,
    "training": training,
    "speed": speed,
    "compiled": compiled,
}
"""The most telling first."""


def main(name: str, kind: str) -> None:
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, 0)
    with tempfile.TemporaryDirectory(prefix="gpu") as folder:
        PARTS[name](device, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
