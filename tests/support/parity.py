"""Trains the tiny model in any layout and compares what comes out with another layout."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch, Engine, EngineConfig, StepResult
from keepwarm.parallel.engine_support import registered_engine
from keepwarm.parallel.loss import MAIN
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.model import ModelParts
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.job.files import load_model
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.ranks import ROOT, run_ranks

SEED = 7
STEPS = 20
SAMPLES = 8
SEQUENCE = 16
CLIP_NORM = 0.25
"""Below the norm of every step of the tiny model, so that every step is clipped."""

State = dict[str, torch.Tensor]
"""Whole tensors by name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run: the layout, and what must give the same result in every layout."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    schedule: str = "1f1b"
    sequence: bool = False
    data_mode: str = "reshard"
    """reshard and keep are fsdp with the two values of `reshard_after_forward`; hsdp shards over two ranks."""
    accumulate: str = "whole"
    layer_split: tuple[int, ...] | None = None
    recompute: str = "none"
    micro_batches: int = 2
    tied: bool = False
    masks: str = "unequal"
    documents: bool = False
    clipped: bool = False
    optimizer: str = "sgd"
    precision: str = "fp64"
    engine: str = "torch"
    zero_stage: int = 1
    offload: bool = False
    z_loss: float = 0.0

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def reference(self) -> "Case":
        """The same run on one rank of the torch engine."""
        return replace(
            Case(),
            tied=self.tied,
            masks=self.masks,
            documents=self.documents,
            clipped=self.clipped,
            optimizer=self.optimizer,
            precision=self.precision,
            z_loss=self.z_loss,
        )

    def __str__(self) -> str:
        words = [f"{self.tensor}x{self.pipeline}x{self.data}"]
        for name, default in Case.__dataclass_fields__.items():
            value = getattr(self, name)
            if name not in ("tensor", "pipeline", "data") and value != default.default:
                words.append(name if value is True else str(value))
        return "-".join(words)


@dataclass(frozen=True)
class Outcome:
    """What a run returned at each step and the state it ended with."""

    steps: list[StepResult]
    state: State


def model_spec(case: Case) -> ModelSpec:
    """The model of `configs/ci/tiny.yaml`."""
    return load_model(ROOT / "configs/models/tiny.yaml").model_copy(
        update={"tied_embeddings": case.tied, "z_loss": case.z_loss}
    )


def optimizer_spec(case: Case) -> OptimizerSpec:
    return OptimizerSpec(
        name=case.optimizer,  # type: ignore[arg-type]
        momentum=0.9 if case.optimizer == "sgd" else 0.0,
        clip_norm=CLIP_NORM if case.clipped else None,
    )


def learning_rate(case: Case, step: int) -> float:
    """Of step 0, 1, ...: falls linearly.

    With SGD a rate of 0.03 already throws frequent embeddings about, and rounding in fp32 with them.
    """
    return (0.01 if case.optimizer == "sgd" else 1e-3) * (1 - step / (2 * STEPS))


def global_batch(case: Case, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens, targets and documents `[SAMPLES, SEQUENCE]`, a function of the step and of what the case masks.

    With unequal masks the numbers of unmasked targets of the samples lie between none and all.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    # Low ids are frequent, so that there is something to learn.
    uniform = torch.rand(SAMPLES, SEQUENCE + 1, generator=generator)
    text = (uniform.pow(3) * model_spec(case).vocabulary_size).long()
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].clone()
    if case.masks == "unequal":
        share = torch.rand(SAMPLES, 1, generator=generator).pow(2)
        share[step % SAMPLES] = 0.0
        targets[torch.rand(SAMPLES, SEQUENCE, generator=generator) >= share] = IGNORED
    if not case.documents:
        return tokens, targets, None
    starts = torch.rand(SAMPLES, SEQUENCE, generator=generator) < 0.2
    documents = starts.cumsum(1).to(torch.int32)
    targets[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORED
    return tokens, targets, documents


def rank_batch(case: Case, step: int, layout: Layout, rank: int) -> Batch:
    """The share of one rank in `global_batch`, in micro-batches."""
    share = SAMPLES // layout.data
    start = layout.coordinates(rank).data * share
    tokens, targets, documents = (
        None if whole is None else whole[start : start + share].view(case.micro_batches, -1, SEQUENCE)
        for whole in global_batch(case, step)
    )
    assert tokens is not None
    assert targets is not None
    return Batch(tokens=tokens, targets=targets, documents=documents)


def make_model(case: Case) -> ModelParts:
    """The model that the case trains."""
    return Decoder(model_spec(case), SEED)


def make_engine(case: Case, model: Callable[[Case], ModelParts] = make_model) -> Any:
    """The engine of this rank, called by every rank of the case's world."""
    zero = {"zero_stage": case.zero_stage, "offload_optimizer": case.offload}
    spec = ParallelSpec.model_validate(
        {
            "engine": case.engine,
            "tensor": case.tensor,
            "pipeline": case.pipeline,
            "data": case.data,
            "sequence": case.sequence,
            "schedule": case.schedule,
            "layer_split": case.layer_split,
            "data_mode": case.data_mode if case.data_mode in ("hsdp", "ddp") else "fsdp",
            "accumulate": case.accumulate if case.engine != "deepspeed" else "auto",
            "reshard_after_forward": case.data_mode != "keep",
            "shard_size": 2 if case.data_mode == "hsdp" else None,
            "options": zero if case.engine == "deepspeed" else {},
        }
    )
    numerics = NumericsSpec.model_validate({"precision": case.precision, "recompute": case.recompute})
    return registered_engine(spec.engine).engine_class()(
        EngineConfig(
            model=model(case),
            parallel=spec,
            optimizer=optimizer_spec(case),
            numerics=numerics,
            layout=Layout.of(spec),
            device=torch.device("cpu"),
            timeout=timedelta(seconds=60),
        )
    )


def run_case(
    case: Case,
    *,
    steps: range = range(STEPS),
    start: State | None = None,
    fault: Callable[[Any], AbstractContextManager[None]] | None = None,
) -> Outcome:
    """Train the case on its ranks, from `start` if given, and put the state together from all shards.

    `fault` makes a context in which each rank trains: what a test breaks on purpose.
    """
    ranks = run_ranks(case.world_size, _train, case, steps, start, fault, deadline=280.0)
    results = [steps_of_rank for steps_of_rank, _ in ranks]
    assert all(result == results[0] for result in results), f"ranks disagree on the result of a step: {results}"
    return Outcome(results[0], assemble([shards for _, shards in ranks]))


def _train(
    case: Case,
    steps: range,
    start: State | None,
    fault: Callable[[Any], AbstractContextManager[None]] | None,
) -> tuple[list[StepResult], list["HeldShard"]]:
    engine = make_engine(case)
    if start is not None:
        write_state(engine, start)
    with nullcontext() if fault is None else fault(engine):
        results = [train_step(engine, case, step) for step in steps]
    shards = held_shards(engine)
    engine.close()
    return results, shards


def train_step(engine: Engine, case: Case, step: int) -> StepResult:
    """Step number `step` of the case on this rank."""
    return engine.step(rank_batch(case, step, engine.layout, dist.get_rank()), learning_rate(case, step))


@dataclass(frozen=True)
class HeldShard:
    """A copy of a shard that may leave its rank."""

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    replicas: tuple[int, ...]
    values: torch.Tensor
    flat: tuple[int, int] | None = None

    @property
    def box(self) -> tuple[slice, ...]:
        return _box(self.offsets, self.shape)


def held_shards(engine: Engine) -> list[HeldShard]:
    """Copies of all shards of this rank."""
    return [
        HeldShard(
            shard.name,
            shard.global_shape,
            shard.offsets,
            shard.shape,
            shard.replicas,
            shard.local.detach().clone(),
            shard.flat,
        )
        for shard in engine.state().values()
    ]


def write_state(engine: Engine, state: Mapping[str, torch.Tensor]) -> None:
    """Restore this rank's shards from whole tensors; the names must be the same."""
    shards = engine.state()
    assert set(shards) <= set(state), set(shards) - set(state)
    for name, shard in shards.items():
        assert tuple(state[name].shape) == shard.global_shape, name
        part = state[name][_box(shard.offsets, shard.shape)]
        shard.local.detach().copy_(part if shard.flat is None else part.flatten()[slice(*shard.flat)])
    engine.restored()


def assemble(ranks: Sequence[Sequence[HeldShard]]) -> State:
    """Whole tensors from the shards of all ranks.

    Asserts what `Shard` promises: the parts of a tensor cover it exactly, `replicas` are precisely the ranks that
    hold the same part, and they hold the same bits.
    """
    by_name: dict[str, dict[object, list[tuple[int, HeldShard]]]] = {}
    for rank, shards in enumerate(ranks):
        for shard in shards:
            key = shard.offsets, shard.shape, shard.flat
            by_name.setdefault(shard.name, {}).setdefault(key, []).append((rank, shard))
    state = {}
    for name, boxes in by_name.items():
        first = next(iter(boxes.values()))[0][1]
        whole = torch.empty(first.global_shape, dtype=first.values.dtype)
        covered = torch.zeros(first.global_shape, dtype=torch.int32)
        for holders in boxes.values():
            shard = holders[0][1]
            holding = tuple(rank for rank, _ in holders)
            for rank, other in holders:
                assert other.global_shape == first.global_shape, name
                assert other.replicas == holding, f"{name}: rank {rank} names {other.replicas}, {holding} hold the box"
                assert equal_bits(other.values, shard.values), f"{name}: ranks {holding} differ at {shard.offsets}"
            _fill(whole, shard, shard.values)
            counts = covered[shard.box].flatten()[slice(*shard.flat or (None,))]
            _fill(covered, shard, counts.view(shard.values.shape) + 1)
        assert bool((covered == 1).all()), f"{name}: its shards do not cover it exactly once"
        state[name] = whole
    return state


def _box(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


def _fill(whole: torch.Tensor, shard: HeldShard, values: torch.Tensor) -> None:
    """Write what a shard says of its part of `whole`."""
    box = whole[shard.box].clone()
    if shard.flat is None:
        box.copy_(values)
    else:
        box.view(-1)[slice(*shard.flat)] = values
    whole[shard.box] = box


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same to the bit, NaN included."""
    return a.dtype == b.dtype and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def differing(a: State, b: State) -> list[str]:
    """Names of tensors that are not the same to the bit."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return [name for name in a if not equal_bits(a[name], b[name])]


def violations(case: Case, expected: Outcome, found: Outcome) -> list[str]:
    """Where two runs differ by more than rounding allows; each text begins with loss, norm or weight.

    fp64: 1e-9 relative, of weights relative to the norm of the tensor. fp32: the main loss 1e-5
    absolute, others relative where they are above 1; with SGD weights
    1e-6 of the norm of the tensor and norms 1e-4. AdamW divides a gradient near zero by itself: fp32 rounding grows
    in its weights, and they are compared in fp64 alone.
    """
    double = case.precision == "fp64"
    steady = double or case.optimizer == "sgd"
    problems = []
    for step, (a, b) in enumerate(zip(expected.steps, found.steps, strict=True)):
        assert a.losses.keys() == b.losses.keys(), (a.losses.keys(), b.losses.keys())
        for name, loss in a.losses.items():
            if not abs(loss - b.losses[name]) <= (
                1e-9 * abs(loss) if double else 1e-5 * (1 if name == MAIN else max(1, abs(loss)))
            ):
                problems.append(f"loss of step {step}: {name} is {b.losses[name]!r} instead of {loss!r}")
        if steady and not abs(a.grad_norm - b.grad_norm) <= (1e-9 if double else 1e-4) * a.grad_norm:
            problems.append(f"norm of step {step}: {b.grad_norm!r} instead of {a.grad_norm!r}")
        if (a.tokens, a.skipped) != (b.tokens, b.skipped):
            problems.append(f"loss of step {step}: {b} instead of {a}")
    if steady:
        weights = {name for name in expected.state if name.startswith("model.")}
        assert weights == {name for name in found.state if name.startswith("model.")}
        for name in sorted(weights):
            wanted, got = expected.state[name].double(), found.state[name].double()
            error = float((wanted - got).norm() / wanted.norm())
            if not error <= (1e-9 if double else 1e-6):
                problems.append(f"weight {name}: relative error {error:.1e}")
    return problems
