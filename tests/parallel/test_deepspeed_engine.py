"""The DeepSpeed engine computes what the torch engine computes on one rank, and its state goes anywhere and back."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch, StepResult
from keepwarm.parallel.optimizer import clip
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job
from tests.support import parity
from tests.support.parity import Case, HeldShard, Outcome
from tests.support.ranks import run_ranks
from tests.support.runs.legs import train_leg

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install 'keepwarm[deepspeed]'",
    ),
    pytest.mark.dist,
    pytest.mark.timeout(600),
]

Fault = Callable[[Any], AbstractContextManager[None]]


def case(**fields: Any) -> Case:
    return Case(engine="deepspeed", precision="fp32", **fields)


CLIPPED = {"optimizer": "adamw", "clipped": True}
TWO = case(data=2, **CLIPPED)
STAGES = case(pipeline=2, tied=True, **CLIPPED)
CUBE = case(tensor=2, pipeline=2, data=2, tied=True, micro_batches=4, **CLIPPED)


@functools.cache
def reference(of: Case) -> Outcome:
    """The run on one rank of the torch engine that `of` must agree with."""
    return parity.run_case(of.reference)


def differences(of: Case, found: Outcome) -> list[str]:
    """Where a run differs from the reference: losses 1e-5 relative, besides what `parity.violations` compares."""
    expected = reference(of)
    pairs = zip(expected.steps, found.steps, strict=False)
    off = [
        f"loss of step {i}: {b.loss!r} instead of {a.loss!r}"
        for i, (a, b) in enumerate(pairs)
        if not abs(a.loss - b.loss) <= 1e-5 * a.loss
    ]
    return off + parity.violations(of, expected, found)


@pytest.mark.parametrize("of", [TWO, STAGES], ids=str)
def test_deepspeed_layout_equals_torch_on_one_rank(of: Case) -> None:
    assert differences(of, parity.run_case(of)) == []


LONG = [
    case(),
    case(**CLIPPED),
    case(data=2),
    case(data=2, zero_stage=2, **CLIPPED),
    case(data=2, zero_stage=3, **CLIPPED),
    case(data=2, offload=True, **CLIPPED),
    case(data=2, documents=True, recompute="selective", **CLIPPED),
    case(data=4, micro_batches=2, tied=True),
    case(pipeline=2),
    case(pipeline=4, tied=True, micro_batches=4, layer_split=(1, 1, 1, 1), **CLIPPED),
    case(pipeline=2, layer_split=(1, 3), recompute="full", documents=True),
    case(tensor=2),
    case(tensor=2, tied=True, **CLIPPED),
    case(tensor=2, data=2, zero_stage=2, **CLIPPED),
    case(tensor=2, pipeline=2, data=2),
    CUBE,
]


@pytest.mark.long
@pytest.mark.parametrize("of", LONG, ids=str)
def test_deepspeed_every_layout_equals_torch_on_one_rank(of: Case) -> None:
    assert differences(of, parity.run_case(of)) == []


@contextmanager
def gradients_doubled(engine: Any) -> Iterator[None]:
    gradients = engine._partition.gradients

    def doubled() -> list[clip.Gradient]:
        found = gradients()
        for one in found:
            one.tensor.mul_(2)
        return found

    with patch.object(engine._partition, "gradients", doubled):
        yield


@contextmanager
def stage_left_out_of_norm(engine: Any) -> Iterator[None]:
    squared_norm = clip.squared_norm
    last = engine.layout.coordinates(dist.get_rank()).pipeline == engine.layout.pipeline - 1
    with patch.object(clip, "squared_norm", lambda *of: squared_norm(*of) * (0 if last else 1)):
        yield


@contextmanager
def mean_of_means(engine: Any) -> Iterator[None]:
    """Every rank divides by its own number of targets, and the means are averaged: what DeepSpeed does unasked."""
    forward, losses = engine._forward, engine._losses

    def over_own_count(micro: Batch) -> torch.Tensor:
        whole, losses.count = losses.count, (micro.targets != IGNORED).sum() * engine.layout.data * 2
        try:
            return forward(micro)
        finally:
            losses.count = whole

    with patch.object(engine, "_forward", over_own_count):
        yield


TEETH: list[tuple[Fault, Case]] = [
    (gradients_doubled, case(data=2)),
    (stage_left_out_of_norm, STAGES),
    (mean_of_means, case(data=2)),
]


@pytest.mark.parametrize(("fault", "of"), TEETH, ids=lambda value: getattr(value, "__name__", str(value)))
def test_deepspeed_planted_fault_is_found_in_weights(fault: Fault, of: Case) -> None:
    # Under SGD a wrong norm shows in the weights too; AdamW forgives it.
    of, steps = replace(of, optimizer="sgd"), range(3)
    expected = parity.run_case(of.reference, steps=steps)
    assert parity.violations(of, expected, parity.run_case(of, steps=steps)) == []
    broken = parity.violations(of, expected, parity.run_case(of, steps=steps, fault=fault))
    assert any(text.startswith("weight ") for text in broken), broken


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"data": 2}, {"data": 2, "zero_stage": 3}, {"pipeline": 2, "tied": True}], ids=str)
def test_deepspeed_bf16_stays_close_to_torch_and_keeps_fp32_state(layout: dict[str, Any]) -> None:
    of = replace(case(**layout, **CLIPPED), precision="bf16")
    expected, found = (parity.run_case(one, steps=range(5)) for one in (of.reference, of))
    exact = parity.run_case(replace(of.reference, precision="fp32"), steps=range(5))
    losses = [step.loss for step in found.steps]
    assert losses == pytest.approx([step.loss for step in expected.steps], rel=2e-3)
    assert losses[0] != exact.steps[0].loss
    assert {str(tensor.dtype) for name, tensor in found.state.items() if name != "optimizer.step"} == {"torch.float32"}


def _same(a: list[HeldShard], b: list[HeldShard]) -> bool:
    return all(parity.equal_bits(x.values, y.values) for x, y in zip(a, b, strict=True))


def _through_a_bad_step(of: Case) -> tuple[list[tuple[int, bool, bool]], StepResult, bool, list[StepResult]]:
    """Around the steps 0 and 1 and a bad one between them: what `before_update` saw, and what the bad one did."""
    linear = torch.nn.functional.linear
    engine, rank = parity.make_engine(of), dist.get_rank()
    calls, steps = [], []

    def train(step: int) -> None:
        before, copies = parity.held_shards(engine), []
        batch = parity.rank_batch(of, step, engine.layout, rank)
        rate = parity.learning_rate(of, step)
        steps.append(engine.step(batch, rate, lambda: copies.append(parity.held_shards(engine))))
        calls.append((len(copies), _same(copies[0], before), _same(parity.held_shards(engine), before)))

    train(0)
    batch = parity.rank_batch(of, 9, engine.layout, rank)
    weight = next(shard.local for name, shard in engine.state().items() if name.endswith("mlp.down.weight"))
    kept = weight.detach().clone()
    if rank == 0:
        weight.detach().view(-1)[0] = torch.nan
    engine.restored()
    before = parity.held_shards(engine)
    bad = engine.step(batch, 1.0)
    unchanged = _same(parity.held_shards(engine), before)
    weight.detach().copy_(kept)
    engine.restored()
    masked = Batch(tokens=batch.tokens, targets=torch.full_like(batch.targets, IGNORED))
    before = parity.held_shards(engine)
    assert engine.step(masked, 1.0).skipped
    unchanged = unchanged and _same(parity.held_shards(engine), before)
    before, score = (
        parity.held_shards(engine),
        engine.evaluate(Batch(tokens=batch.tokens[:1], targets=batch.targets[:1])),
    )
    assert score.tokens > 0
    assert _same(parity.held_shards(engine), before)
    train(1)
    engine.close()
    assert torch.nn.functional.linear is linear
    return calls, bad, unchanged, steps


SKIPPING = [
    STAGES,
    pytest.param(TWO, marks=pytest.mark.long),
    pytest.param(replace(TWO, zero_stage=2), marks=pytest.mark.long),
    pytest.param(replace(TWO, zero_stage=3), marks=pytest.mark.long),
    pytest.param(replace(TWO, offload=True), marks=pytest.mark.long),
    pytest.param(CUBE, marks=pytest.mark.long),
]


@pytest.mark.parametrize("of", SKIPPING, ids=str)
def test_deepspeed_bad_step_is_skipped_by_all_ranks(of: Case) -> None:
    expected = parity.run_case(of, steps=range(2))
    for calls, bad, unchanged, steps in run_ranks(of.world_size, _through_a_bad_step, of, deadline=250.0):
        assert calls == [(1, True, False), (1, True, False)]
        assert bad.skipped
        assert unchanged
        assert steps == expected.steps


def _relay(legs: list[Case], root: Path, length: int) -> None:
    whole = parity.run_case(legs[0].reference, steps=range(length * len(legs)))
    steps: list[StepResult] = []
    for at, of in enumerate(legs):
        ranks = run_ranks(of.world_size, train_leg, of, range(at * length, (at + 1) * length), root, deadline=250.0)
        steps += ranks[0][0]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in whole.steps], rel=1e-5)


def on(engine: str, of: Case, **layout: int) -> Case:
    return replace(of, engine=engine, **layout)  # type: ignore[arg-type]


def test_deepspeed_relay_torch_megatron_and_back_continues(tmp_path: Path) -> None:
    legs = [on("torch", STAGES, pipeline=1), on("megatron", STAGES, pipeline=1, tensor=2), STAGES]
    _relay([*legs, on("torch", STAGES, pipeline=1, data=2)], tmp_path, 3)


@pytest.mark.long
def test_deepspeed_relay_through_every_zero_stage_continues(tmp_path: Path) -> None:
    legs = [
        on("torch", CUBE),
        CUBE,
        replace(TWO, tied=True, zero_stage=3),
        replace(TWO, tied=True, data=4, zero_stage=2),
    ]
    _relay([*legs, replace(TWO, tied=True, tensor=2, offload=True), on("torch", CUBE, tensor=1)], tmp_path, 4)


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(one, marks=[] if one == STAGES else pytest.mark.long)
        for one in (STAGES, replace(TWO, zero_stage=3), CUBE)
    ],
    ids=str,
)
def test_deepspeed_restored_state_continues_bitwise(of: Case) -> None:
    whole, half = parity.run_case(of, steps=range(4)), parity.run_case(of, steps=range(2))
    rest = parity.run_case(of, steps=range(2, 4), start=half.state)
    assert half.steps + rest.steps == whole.steps
    assert parity.differing(rest.state, whole.state) == []


TINY = Path(__file__).parents[2] / "configs/ci/tiny.yaml"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["parallel.tensor=2", "parallel.sequence=true"], "parallel.sequence"),
        (["parallel.pipeline=2", "parallel.schedule=interleaved"], "parallel.schedule"),
        (["parallel.pipeline=2", "parallel.options.zero_stage=2"], "parallel.options.zero_stage = 2"),
        (["parallel.data_mode=ddp"], "parallel.data_mode"),
        (["numerics.precision=fp64"], "numerics.precision = fp64"),
        (["numerics.compile=true"], "numerics.compile"),
        (
            ["parallel.options.offload_optimizer=true", "optimizer.implementation=apex"],
            "parallel.options.offload_optimizer",
        ),
    ],
)
def test_deepspeed_unsupported_option_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(SpecError, match=rf"parallel\.engine = deepspeed: {named}"):
        load_job(TINY, ["parallel.engine=deepspeed", *overrides])


@pytest.mark.parametrize("engine", ["torch", "megatron"])
def test_zero_stage_of_other_engines_is_refused(engine: str) -> None:
    said = r"parallel\.options\.zero_stage: unknown key of this engine; it belongs to parallel\.engine = deepspeed"
    with pytest.raises(SpecError, match=said):
        load_job(TINY, [f"parallel.engine={engine}", "parallel.options.zero_stage=3"])
