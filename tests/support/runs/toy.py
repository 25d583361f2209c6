"""A test bed for continual pretraining on a CPU: order-2 Markov sources and a fixed-window model of 70,488 parameters.

Everything else that trains here is the product's own, put together by `keepwarm.trainer.loop.build`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from keepwarm.parallel.loss import MAIN
from keepwarm.parallel.shard import Shard
from keepwarm.parallel.style import TensorStyle
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.packing import PackedSource, Samples
from keepwarm.trainer.data.permutation import window_at
from keepwarm.trainer.data.preprocess.prepare import PreparedData
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.job.sections import CheckpointSpec
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.loop.build import assemble
from keepwarm.trainer.loop.interrupt import Interrupt
from keepwarm.trainer.loop.loop import train
from keepwarm.trainer.monitor.goodput import Timeline

VOCABULARY, WINDOW, EMBEDDING, HIDDEN, BATCH = 24, 6, 24, 192, 256
PEAK, FLOOR, CONSTANT = 3e-3, 3e-4, 1.65e-3
COSINE = {"schedule": "cosine", "max": PEAK, "min": FLOOR, "warmup": 0.01}
CONTEXTS = VOCABULARY**2


def table(seed: int, concentration: float = 0.08) -> torch.Tensor:
    """Next-token probabilities `[contexts, vocabulary]`; rows are Dirichlet draws."""
    torch.manual_seed(seed)
    shape = (CONTEXTS, VOCABULARY)
    drawn = torch.distributions.Gamma(torch.full(shape, concentration), torch.ones(shape)).sample()
    return F.normalize(drawn + 1e-4, p=1, dim=1)


def windows(probabilities: torch.Tensor, seed: int, sequences: int = 4000, length: int = 120) -> torch.Tensor:
    """All windows of WINDOW + 1 tokens of sequences drawn from the chain, `[windows, WINDOW + 1]`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, VOCABULARY, (sequences,), generator=generator) for _ in range(2)]
    for _ in range(length - 2):
        context = probabilities[drawn[-2] * VOCABULARY + drawn[-1]]
        drawn.append(torch.multinomial(context, 1, generator=generator)[:, 0])
    return torch.stack(drawn, 1).unfold(1, WINDOW + 1, 1).reshape(-1, WINDOW + 1)


@dataclass(frozen=True, eq=False)
class MarkovSource:
    """A `Source` whose samples are windows: six tokens, of which only the last predicts."""

    name: str
    data: torch.Tensor
    sequence_length: int = WINDOW

    def at_length(self, sequence_length: int) -> "MarkovSource":
        assert sequence_length == WINDOW
        return self

    @property
    def identity(self) -> str:
        return f"markov-{self.name}/{WINDOW}"

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, k: Ints, *, seed: int) -> Samples:
        return self.windows(window_at(k, seed=seed, identity=self.identity, size=self.size))

    def windows(self, indices: Ints) -> Samples:
        rows = self.data[torch.from_numpy(indices)].numpy()
        targets = rows[:, 1:].copy()
        targets[:, :-1] = IGNORED
        return Samples(rows[:, :-1].copy(), targets, None)


SEEDS = {"t0": 11, "t1": 12, "t2": 13, "t3": 14}


@lru_cache
def source(name: str) -> MarkovSource:
    """Training data of one of the sources of SEEDS; of `NAME/some` a tenth, of `NAME/best` the likeliest tenth."""
    chain, _, part = name.partition("/")
    probabilities = table(SEEDS[chain])
    drawn = windows(probabilities, SEEDS[chain] - 10)
    if part:
        scores = torch.rand(len(drawn), generator=torch.Generator().manual_seed(1))
        if part == "best":
            contexts = drawn[:, :-2] * VOCABULARY + drawn[:, 1:-1]
            scores = probabilities[contexts, drawn[:, 2:]].log().sum(1)
        drawn = drawn[scores.argsort(descending=True)[: len(drawn) // 10]]
    return MarkovSource(name, drawn)


@lru_cache
def held_out(name: str) -> MarkovSource:
    return MarkovSource(f"{name}-held-out", windows(table(SEEDS[name]), SEEDS[name] + 89, 200, 40)[:4096])


class Net(nn.Module):
    """Embedding, one hidden layer over the whole window, one residual layer, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.window = nn.Linear(WINDOW * EMBEDDING, HIDDEN)
        self.residual = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.layers = nn.ModuleDict()

    def forward(
        self, x: torch.Tensor, documents: torch.Tensor | None = None, targets: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        hidden = F.gelu(self.window(self.embedding(x).flatten(1)))
        logits: torch.Tensor = self.head(self.norm(hidden + F.gelu(self.residual(hidden))))
        assert targets is not None
        return {MAIN: F.cross_entropy(logits, targets[:, -1], reduction="none")}


class ToyParts:
    """The toy model as `keepwarm.parallel.model.ModelParts`, for one rank."""

    layers = 1
    hidden_size = HIDDEN
    heads = kv_heads = 1
    vocabulary_size = VOCABULARY
    tied_embeddings = False
    loss_weights: Mapping[str, float] = {MAIN: 1.0}

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self._values = {name: value.detach() for name, value in Net().named_parameters()}

    def build_stage(self, layers: range, *, embed: bool, head: bool) -> nn.Module:
        return Net()

    def canonical(self, name: str) -> str:
        return name

    def tensor_plan(self) -> Mapping[str, TensorStyle]:
        return {}

    def initial(
        self, name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
    ) -> torch.Tensor:
        return self._values[name]

    def decays(self, name: str) -> bool:
        return True

    def is_embedding(self, name: str) -> bool:
        return name == "embedding.weight"


def stage(name: str, steps: int, mixture: dict[str, float], lr: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A stage clause by steps."""
    return {"name": name, "tokens": steps * BATCH * WINDOW, "mixture": mixture, "lr": lr, **more}


@dataclass(frozen=True)
class Result:
    """What a run leaves: losses by domain and step, its state and its ledger."""

    evaluations: list[tuple[int, dict[str, float]]]
    state: dict[str, torch.Tensor]
    ledger: Ledger

    def losses(self, domain: str) -> list[float]:
        return [losses[domain] for _, losses in self.evaluations]

    def save(self, folder: Path, world: World) -> None:
        """Write a checkpoint that another run can begin with."""
        shards = {
            name: Shard(
                name=name,
                global_shape=tuple(value.shape),
                offsets=(0,) * value.ndim,
                shape=tuple(value.shape),
                local=value,
                replicas=(0,),
            )
            for name, value in self.state.items()
        }
        Checkpoints(folder, CheckpointSpec(), world, run="parent", layout="").save(
            1, shards, {"ledger": self.ledger.save()}
        )

    @property
    def last(self) -> dict[str, float]:
        return self.evaluations[-1][1]


def run(
    folder: Path,
    stages: Sequence[dict[str, Any]],
    *,
    seed: int,
    every: int | None = None,
    domains: Sequence[str] = ("t0",),
    parent: Result | None = None,
) -> Result:
    """Train the stages one after the other, from the parent's weights, optimizer state and ledger if there is one."""
    mixed = {name for one in stages for moved in (one, *one.get("mixture_steps", ())) for name in moved["mixture"]}
    seen = () if parent is None else (origin.name for origin in parent.ledger.sources.values())
    names = sorted({*mixed, *seen, "t0"})
    run_folder = folder / "run"
    job = JobSpec.model_validate(
        {
            "name": "toy",
            "output": str(run_folder),
            "seed": seed,
            "model": {
                "layers": 1,
                "hidden_size": HIDDEN,
                "heads": 1,
                "ffn_size": 1,
                "vocabulary_size": VOCABULARY,
                "max_sequence_length": WINDOW,
            },
            "data": {
                "sources": {n: n for n in names},
                "validation": {n: n for n in domains},
                "sequence_length": WINDOW,
            },
            "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH},
            "stages": tuple(stages),
            "init_from": None if parent is None else str(folder / "parent"),
            "evaluation": {"every": every, "samples": 4096},
            "log": {"every": 10**9, "tensorboard": False},
        }
    )
    run_folder.mkdir(parents=True)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    data = PreparedData(
        sources=cast(Mapping[str, PackedSource], {name: source(name) for name in names}),
        validation=cast(Mapping[str, PackedSource], {name: held_out(name) for name in domains}),
        tokenizer=None,
    )
    if parent is not None:
        parent.save(folder / "parent", world)
    timeline = Timeline(run_folder, rank=1, began=0.0, restart=False, fresh=True)
    run = assemble(job, world, ToyParts(seed), data, start="fresh", timeline=timeline)
    with Interrupt().watching() as interrupt:
        train(run, interrupt)
    run.callbacks.close(run, "finished")
    run.loader.close()
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    result = Result(
        [(record["step"], record["eval"]) for record in records if "eval" in record],
        {name: shard.local.detach().clone() for name, shard in run.engine.state().items()},
        run.loader.ledger,
    )
    run.engine.close()
    return result
