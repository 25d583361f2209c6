"""How fast a training step is, and how much memory it needs, against plain PyTorch, `transformers`, and by hand.

    python -m tests.bench.train_step [single] [single-memory] [mesh] [mesh-memory] [gpu]

Prints one JSON object; without arguments all parts run. Contestants take turns in the same processes on the same data,
in an order that rotates; a ratio is the median over rounds of (the peer's time / ours), so more than 1 means that
ours is faster. Memory is the growth of the peak resident set from after the imports, in a fresh process each; a ratio
is ours / the peer's. Nothing is skipped silently: without a CUDA device the GPU part says so.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from keepwarm.parallel.engine import Batch, EngineConfig
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.native.engine import TorchEngine
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.trainer.convert.huggingface.config import config_for
from keepwarm.trainer.job.files import load_model
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.make import make_model
from keepwarm.trainer.model.spec import ModelSpec
from tests.bench.by_hand import HandWritten
from tests.support.models import whole_model
from tests.support.ranks import ROOT, close_pools, run_ranks

LR = 1e-4
WARM_UP = 2

SINGLE = ModelSpec(layers=6, hidden_size=256, heads=8, ffn_size=688, vocabulary_size=4096, max_sequence_length=256)
SINGLE_BATCH = (2, 2, 256)
"""Micro-batches, micro size, sequence length."""
SINGLE_ROUNDS = 15

MESH = ModelSpec(layers=4, hidden_size=128, heads=4, ffn_size=344, vocabulary_size=4096, max_sequence_length=128)
MESH_BATCH = (4, 2, 128)
MESH_ROUNDS = 9
MESH_SPEC = ParallelSpec(tensor=2, pipeline=2, data=2, sequence=True)

Step = Callable[[], float]
"""One optimizer step; returns the loss."""


def random_batch(spec: ModelSpec, shape: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and next tokens of `shape`."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, spec.vocabulary_size, (*shape[:2], shape[2] + 1), generator=generator)
    return text[..., :-1].contiguous(), text[..., 1:].contiguous()


def make_engine(spec: AnyModelSpec, parallel: ParallelSpec, numerics: NumericsSpec, device: str = "cpu") -> TorchEngine:
    return TorchEngine(
        EngineConfig(
            model=make_model(spec, 0),
            parallel=parallel,
            optimizer=OptimizerSpec(),
            numerics=numerics,
            layout=Layout.of(parallel),
            device=torch.device(device),
            timeout=timedelta(minutes=5),
        )
    )


def ours_single() -> Step:
    tokens, targets = random_batch(SINGLE, SINGLE_BATCH)
    engine = make_engine(SINGLE, ParallelSpec(), NumericsSpec())
    return lambda: engine.step(Batch(tokens=tokens, targets=targets), LR).loss


def adapted_single() -> Step:
    """The same engine with the layers of `transformers`' Llama, as `model.transformers` gives them."""
    from tests.support.transformers.models import spec_from

    config = config_for(SINGLE, "llama")
    tokens, targets = random_batch(SINGLE, SINGLE_BATCH)
    engine = make_engine(spec_from(config), ParallelSpec(), NumericsSpec())
    return lambda: engine.step(Batch(tokens=tokens, targets=targets), LR).loss


def plain_single() -> Step:
    """The same model code in the loop that everybody writes."""
    tokens, targets = random_batch(SINGLE, SINGLE_BATCH)
    model = whole_model(SINGLE)
    return _plain_step(model, tokens, lambda i: model(tokens[i], targets=targets[i])["main"].sum() / targets.numel())


def transformers_single() -> Step:
    """`transformers`' Llama of the same size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens, targets = random_batch(SINGLE, SINGLE_BATCH)
    config = LlamaConfig(
        vocab_size=SINGLE.vocabulary_size,
        hidden_size=SINGLE.hidden_size,
        intermediate_size=SINGLE.ffn_size,
        num_hidden_layers=SINGLE.layers,
        num_attention_heads=SINGLE.heads,
        num_key_value_heads=SINGLE.key_value_heads,
        max_position_embeddings=SINGLE.max_sequence_length,
        rms_norm_eps=SINGLE.norm_eps,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole_model(SINGLE).parameters())

    def loss(i: int) -> torch.Tensor:
        logits = model(tokens[i]).logits
        return F.cross_entropy(logits.flatten(0, 1), targets[i].flatten(), reduction="sum") / targets.numel()

    return _plain_step(model, tokens, loss)


def _plain_step(model: torch.nn.Module, tokens: torch.Tensor, loss_of: Callable[[int], torch.Tensor]) -> Step:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step() -> float:
        total = 0.0
        for i in range(len(tokens)):
            loss = loss_of(i)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


SINGLE_CONTESTANTS: Mapping[str, Callable[[], Step]] = {
    "ours": ours_single,
    "adapted": adapted_single,
    "plain": plain_single,
    "transformers": transformers_single,
}


def ours_mesh() -> Step:
    layout = Layout.of(MESH_SPEC)
    tokens, targets = random_batch(MESH, MESH_BATCH, seed=layout.coordinates(dist.get_rank()).data)
    engine = make_engine(MESH, MESH_SPEC, NumericsSpec())
    return lambda: engine.step(Batch(tokens=tokens, targets=targets), LR).loss


def hand_mesh() -> Step:
    trainer = HandWritten(MESH, tensor=2, pipeline=2, data=2, micro_batches=MESH_BATCH[0], lr=LR)
    tokens, targets = random_batch(MESH, MESH_BATCH, seed=trainer.mesh["data"].get_local_rank())
    return lambda: trainer.step(tokens.flatten(0, 1), targets.flatten(0, 1))


MESH_CONTESTANTS: Mapping[str, Callable[[], Step]] = {"ours": ours_mesh, "by_hand": hand_mesh}


def race(contestants: Mapping[str, Callable[[], Step]], rounds: int, barrier: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of every step of every contestant, and the losses each began and ended with."""
    steps = {name: make() for name, make in contestants.items()}
    first = {name: step() for name, step in steps.items()}
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    last = {}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            barrier()
            start = time.perf_counter()
            last[name] = steps[name]()
            barrier()
            times[name].append(time.perf_counter() - start)
    return {"times": times, "losses": {name: (first[name], last[name]) for name in names}}


def summary(raced: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Medians, and the ratio of each peer's time to ours round by round."""
    times: dict[str, list[float]] = raced["times"]
    peers = [name for name in times if name != "ours"]
    ratios = {name: statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True)) for name in peers}
    return {
        "step_seconds_median": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "tokens_per_second": {name: round(tokens / statistics.median(values)) for name, values in times.items()},
        "speed_over_peer": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "speed_over_faster_peer": round(min(ratios.values()), 4),
        "first_and_last_loss": raced["losses"],
        "rounds": len(times["ours"]),
    }


def single() -> dict[str, Any]:
    """One process, one thread."""
    torch.set_num_threads(1)
    raced = race(SINGLE_CONTESTANTS, SINGLE_ROUNDS, barrier=lambda: None)
    parameters = sum(p.numel() for p in whole_model(SINGLE).parameters())
    return {"parameters": parameters, "wanted": 0.97, **summary(raced, torch.Size(SINGLE_BATCH).numel())}


def single_memory() -> dict[str, Any]:
    """Three steps in a fresh process for each contestant."""
    grown = {}
    for name in SINGLE_CONTESTANTS:
        command = [sys.executable, "-m", "tests.bench.train_step", "--grow", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        grown[name] = int(done.stdout)
    return _memory(grown)


def _memory(grown: Mapping[str, int]) -> dict[str, Any]:
    peers = {name: round(grown["ours"] / size, 4) for name, size in grown.items() if name != "ours"}
    megabytes = {name: round(size / 2**20, 1) for name, size in grown.items()}
    return {"megabytes": megabytes, "memory_over_peer": peers, "wanted": "at most 1.05"}


def growth(make: Callable[[], Step]) -> int:
    """Bytes by which three steps raise the peak resident set of this process over what it holds now."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    step = make()
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _race_on_ranks() -> dict[str, Any]:
    return race(MESH_CONTESTANTS, MESH_ROUNDS, barrier=dist.barrier)


def _growth_on_ranks(name: str) -> int:
    return growth(MESH_CONTESTANTS[name])


def mesh() -> dict[str, Any]:
    """2x2x2 on eight processes."""
    raced = run_ranks(8, _race_on_ranks, deadline=1200.0)
    return {"wanted": 0.95, **summary(raced[0], 2 * torch.Size(MESH_BATCH).numel())}


def mesh_memory() -> dict[str, Any]:
    """Three steps on eight fresh processes for each contestant; the sum over ranks."""
    grown = {}
    for name in MESH_CONTESTANTS:
        close_pools()
        grown[name] = sum(run_ranks(8, _growth_on_ranks, name, deadline=600.0))
    close_pools()
    return _memory(grown)


def gpu() -> dict[str, Any]:
    """Llama-3 8B on one card: bf16, fp32 master weights and moments, sequence 8192, full recompute."""
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    spec = load_model(ROOT / "configs/models/llama-3-8b.yaml")
    shape = (1, 1, 8192)
    tokens, targets = (part.cuda() for part in random_batch(spec, shape))
    engine = make_engine(
        spec, ParallelSpec(), NumericsSpec(precision="bf16", recompute="full", compile=True), device="cuda"
    )
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = engine.step(Batch(tokens=tokens, targets=targets), LR).loss
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    per_second = torch.Size(shape).numel() / statistics.median(times[4:])
    with torch.device("meta"):
        parameters = sum(
            p.numel() for p in Decoder(spec, 0).build_stage(range(spec.layers), embed=True, head=True).parameters()
        )
    flops = 6 * parameters + 6 * spec.layers * spec.hidden_size * shape[2]
    return {
        "device": torch.cuda.get_device_name(),
        "parameters": parameters,
        "tokens_per_second": round(per_second),
        "mfu": round(per_second * flops / 989e12, 4),
        "wanted": 0.58,
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "loss": loss,
    }


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "single": single,
    "single-memory": single_memory,
    "mesh": mesh,
    "mesh-memory": mesh_memory,
    "gpu": gpu,
}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--grow"]:
        import transformers  # noqa: F401 (in every contestant's process, so that all start equal)

        print(growth(SINGLE_CONTESTANTS[arguments[1]]))
        return
    result: dict[str, Any] = {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0], "torch": torch.__version__}
    for name in arguments or PARTS:
        result[name] = PARTS[name]()
    result["load_after"] = os.getloadavg()[0]
    close_pools()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
