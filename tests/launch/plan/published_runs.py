"""Training runs whose speed was published, as jobs, and the planner's shares fitted to them.

`python -m tests.launch.plan.published_runs` prints the shares and the table of docs/planner.md: each run predicted by
shares that were fitted to all others.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepwarm.launch.plan.step_time import Choice, Efficiency, Sizes, StepModel
from keepwarm.parallel.cards import CARDS, Card
from keepwarm.trainer.job.spec import JobSpec

GRAND_TETON = replace(CARDS["H100"], name="H100 of 500 W with HBM2e", memory_bandwidth=2.4e12)
KEMPNER = replace(CARDS["H200"], per_node=4)
ASYNC = 0.3
"""Share of the tensor axis' collectives that stays visible where products hide them, which keepwarm does not do."""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One figure of a paper or report."""

    name: str
    source: str
    card: Card
    model: dict[str, Any]
    parallel: dict[str, Any]
    sequence: int
    batch: int
    micro_batch: int
    recompute: str
    tokens_per_s: float
    """Of each GPU."""
    compiled: bool = True
    float8: bool = False
    """Linear layers in float8, which keepwarm does not have."""
    asynchronous: bool = False
    """Tensor parallelism whose collectives hide behind products, which keepwarm does not have."""

    @cached_property
    def job(self) -> JobSpec:
        fields = {
            "name": self.name, "output": "runs/none", "model": self.model,
            "data": {"sources": {"all": "/none"}, "sequence_length": self.sequence},
            "batch": {"global_batch_size": self.batch, "micro_batch_size": self.micro_batch},
            "stages": [
                {"name": "all", "tokens": self.batch * self.sequence, "mixture": {"all": 1}, "lr": {"max": 1e-4}}
            ],
            "parallel": self.parallel,
            "numerics": {"precision": "bf16", "recompute": self.recompute, "compile": self.compiled},
        }  # fmt: skip
        return JobSpec.model_validate_json(json.dumps(fields))

    def with_speed(self, tokens_per_s: float) -> "PublishedRun":
        return replace(self, tokens_per_s=tokens_per_s)

    @cached_property
    def _sizes(self) -> Sizes:
        return Sizes(self.job)

    def predicted(self, shares: NDArray[np.float64]) -> float:
        """Return the tokens per second and GPU that the planner expects with these shares."""
        share = efficiency(self.card, shares)
        if self.float8:
            share = replace(share, matrices=share.matrices * math.exp(shares[NAMES.index("float8")]))
        if self.asynchronous:
            share = replace(share, link=share.link / ASYNC)
        choice = Choice(
            parallel=self.job.parallel, micro_batch_size=self.micro_batch, recompute=self.job.numerics.recompute
        )
        return StepModel(self._sizes, self.card, share).tokens_per_s(choice)


def gpt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "vocabulary_size": 51200, "layers": layers, "hidden_size": hidden, "heads": heads, "ffn_size": 4 * hidden,
        "max_sequence_length": 2048, "norm": "layer", "activation": "gelu_tanh", "position": "learned",
        "tied_embeddings": True,
    }  # fmt: skip


def llama(size: str) -> dict[str, Any]:
    layers, hidden, heads, ffn = {
        "8B": (32, 4096, 32, 14336), "70B": (80, 8192, 64, 28672), "405B": (126, 16384, 128, 53248),
    }[size]  # fmt: skip
    return {
        "vocabulary_size": 128256, "layers": layers, "hidden_size": hidden, "heads": heads, "kv_heads": 8,
        "ffn_size": ffn, "max_sequence_length": 8192,
    }  # fmt: skip


def megatron_2021() -> Iterator[PublishedRun]:
    """Table 1 of Narayanan et al. (2021); micro-batches and interleaving from the script that made it."""
    for billions, layers, hidden, heads, tensor, pipeline, nodes, batch, micro_batch, stages, tflops in (
        ("1.7B", 24, 2304, 24, 1, 1, 4, 512, 16, 1, 137.0),
        ("3.6B", 30, 3072, 32, 2, 1, 8, 512, 16, 1, 138.0),
        ("7.5B", 36, 4096, 32, 4, 1, 16, 512, 16, 1, 142.0),
        ("18.4B", 40, 6144, 48, 8, 1, 32, 1024, 8, 1, 135.0),
        ("39.1B", 48, 8192, 64, 8, 2, 64, 1536, 4, 1, 138.0),
        ("76.1B", 60, 10240, 80, 8, 4, 128, 1792, 2, 3, 140.0),
        ("145.6B", 80, 12288, 96, 8, 8, 192, 2304, 2, 2, 148.0),
        ("310.1B", 96, 16384, 128, 8, 16, 240, 2160, 1, 2, 155.0),
        ("529.6B", 105, 20480, 128, 8, 35, 315, 2520, 1, 3, 163.0),
        ("1008B", 128, 25600, 160, 8, 64, 384, 3072, 1, 1, 163.0),
    ):
        flops = 96 * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
        yield PublishedRun(
            name=f"Megatron-LM {billions}", source="Narayanan et al. (2021)", card=CARDS["A100"],
            model=gpt(layers, hidden, heads), sequence=2048, batch=batch, micro_batch=micro_batch, recompute="full",
            parallel={
                "tensor": tensor, "pipeline": pipeline, "data": nodes * 8 // tensor // pipeline, "data_mode": "ddp",
                **({"schedule": "interleaved", "stages_per_rank": stages} if stages > 1 else {}),
            },
            tokens_per_s=tflops * 1e12 / flops * 2048,
        )  # fmt: skip


def megatron_turing() -> Iterator[PublishedRun]:
    for data, seconds in ((8, 60.1), (10, 50.2), (12, 44.4)):
        yield PublishedRun(
            name=f"MT-NLG 530B, data {data}", source="Smith et al. (2022)", card=CARDS["A100"],
            model=gpt(105, 20480, 128), sequence=2048, batch=1920, micro_batch=1, recompute="full",
            parallel={"tensor": 8, "pipeline": 35, "data": data, "data_mode": "ddp"},
            tokens_per_s=1920 * 2048 / seconds / (280 * data),
        )  # fmt: skip


def llama_3() -> Iterator[PublishedRun]:
    """Table 4 of Grattafiori et al. (2024) without context parallelism; four stages a rank are our reading."""
    for data, tflops in ((64, 430.0), (128, 400.0)):
        flops = 6 * 405.85e9 + 6 * 126 * 16384 * 8192
        yield PublishedRun(
            name=f"Llama 3 405B, data {data}", source="Grattafiori et al. (2024)", card=CARDS["H100"],
            model=llama("405B"), sequence=8192, batch=2048, micro_batch=1, recompute="none",
            parallel={
                "tensor": 8, "pipeline": 16, "data": data, "sequence": True, "schedule": "interleaved",
                "stages_per_rank": 4, "layer_split": [1, *[2] * 62, 1], "reshard_after_forward": False,
            },
            tokens_per_s=tflops * 1e12 / flops,
        )  # fmt: skip


def torchtitan() -> Iterator[PublishedRun]:
    """torchtitan's reports of December 2024 and June 2025; a pipeline has as many micro-batches as ranks by default."""
    for cards, compiled, float8, speed in (
        (8, False, False, 5762.0), (8, True, False, 6667.0), (8, True, True, 8532.0),
        (128, False, False, 5605.0), (128, True, False, 6514.0), (128, True, True, 8380.0),
    ):  # fmt: skip
        how = "float8" if float8 else "compiled" if compiled else "eager"
        yield PublishedRun(
            name=f"Llama 3.1 8B, {cards} cards, {how}", source="torchtitan", card=GRAND_TETON, model=llama("8B"),
            sequence=8192, batch=2 * cards, micro_batch=2, recompute="selective", parallel={"data": cards},
            compiled=compiled, float8=float8, tokens_per_s=speed,
        )  # fmt: skip
    for float8, asynchronous, speed in (
        (False, False, 597.3), (False, True, 652.4), (True, False, 809.8), (True, True, 942.4),
    ):  # fmt: skip
        how = ("float8" if float8 else "bf16") + (", async" if asynchronous else "")
        yield PublishedRun(
            name=f"Llama 3.1 70B, 256 cards, {how}", source="torchtitan", card=GRAND_TETON, model=llama("70B"),
            sequence=8192, batch=512, micro_batch=16, recompute="full",
            parallel={"tensor": 8, "data": 32, "sequence": True},
            float8=float8, asynchronous=asynchronous, tokens_per_s=speed,
        )  # fmt: skip
    for stages, split, speed in ((1, [15, *[16] * 6, 15], 100.0), (2, [7, *[8] * 14, 7], 128.0)):
        schedule = {"schedule": "interleaved", "stages_per_rank": stages} if stages > 1 else {}
        yield PublishedRun(
            name=f"Llama 3.1 405B, 512 cards, {'interleaved' if stages > 1 else '1F1B'}", source="torchtitan",
            card=GRAND_TETON, model=llama("405B"), sequence=8192, batch=256, micro_batch=4, recompute="full",
            parallel={
                "tensor": 8, "pipeline": 8, "data": 8, "sequence": True, "layer_split": split,
                "reshard_after_forward": False, **schedule,
            },
            float8=True, asynchronous=True, tokens_per_s=speed,
        )  # fmt: skip


def kempner() -> Iterator[PublishedRun]:
    for cards, speed in ((1, 10471.0), (2, 18728.0), (4, 38983.0)):
        yield PublishedRun(
            name=f"Llama 3 8B, {cards} H200", source="KempnerForge", card=KEMPNER, model=llama("8B"), sequence=4096,
            batch=8 * cards, micro_batch=4, recompute="full", parallel={"data": cards}, tokens_per_s=speed / cards,
        )  # fmt: skip


RUNS = tuple(run for runs in (megatron_2021, megatron_turing, llama_3, torchtitan, kempner) for run in runs())

NAMES = (
    "A100.matrices", "A100.attention", "H100.matrices", "H100.attention", "500W.matrices", "500W.attention",
    "elementwise", "eager", "link", "network", "jitter", "float8",
)  # fmt: skip
EXPECTED = np.log([0.65, 0.2, 0.75, 0.4, 0.55, 0.4, 0.4, 2.0, 0.9, 0.8, 0.015, 1.6])
"""Where the fit begins, and what draws it as far as the runs do not."""
LOOSENESS = np.array([0.3, 0.4, 0.3, 0.4, 0.3, 0.4, 0.5, 0.5, 0.05, 0.1, 0.5, 0.3])
"""Standard deviations of what is expected; those of the runs are 0.03."""


def efficiency(card: Card, shares: NDArray[np.float64]) -> Efficiency:
    """Return the planner's shares for a card, from the logarithms that are fitted."""
    value = dict(zip(NAMES, np.exp(shares).tolist(), strict=True))
    kind = "A100" if card.name == "A100" else "500W" if card is GRAND_TETON else "H100"
    return Efficiency(
        matrices=value[f"{kind}.matrices"], attention=value[f"{kind}.attention"], elementwise=value["elementwise"],
        eager=value["eager"], link=value["link"], network=value["network"], jitter=value["jitter"],
    )  # fmt: skip


def fit(runs: Sequence[PublishedRun], begin: NDArray[np.float64] = EXPECTED) -> NDArray[np.float64]:
    """Return the shares that are nearest to what is expected and to these runs: damped Gauss-Newton on logarithms."""

    def residuals(shares: NDArray[np.float64]) -> NDArray[np.float64]:
        errors = [math.log(run.predicted(shares) / run.tokens_per_s) / 0.03 for run in runs]
        return np.concatenate([errors, (shares - EXPECTED) / LOOSENESS])

    shares, damping = begin.copy(), 1.0
    now = residuals(shares)
    for _ in range(30):
        steps = np.eye(len(shares)) * 1e-4
        slopes = np.stack([(residuals(shares + step) - now) / 1e-4 for step in steps], axis=1)
        move = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(shares)), -slopes.T @ now)
        moved = residuals(shares + np.clip(move, -0.3, 0.3))
        if moved @ moved < now @ now:
            shares, now, damping = shares + np.clip(move, -0.3, 0.3), moved, damping / 3
            if np.abs(move).max() < 1e-3:
                break
        else:
            damping *= 4
    return shares


def main() -> None:
    shares = fit(RUNS)
    for name, value in zip(NAMES, np.exp(shares), strict=True):
        print(f"{name} = {value:.3f}")
    print("\n| run | source | tokens/s of a GPU | fitted | predicted by the others |\n|---|---|---|---|---|")
    for run in RUNS:
        others = fit([other for other in RUNS if other is not run], shares)
        errors = " | ".join(f"{run.predicted(each) / run.tokens_per_s - 1:+.0%}" for each in (shares, others))
        print(f"| {run.name} | {run.source} | {run.tokens_per_s:,.1f} | {errors} |")


if __name__ == "__main__":
    main()
