"""Megatron Core computes what the torch engine computes on one rank, and faults in it are seen."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch, Evaluation, StepResult
from keepwarm.parallel.optimizer import clip
from tests.support import parity
from tests.support.parity import Case, Outcome
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

MEGATRON = Case(engine="megatron", precision="fp32", clipped=True, optimizer="adamw")
SGD = replace(MEGATRON, optimizer="sgd", data_mode="ddp")
CUBE = replace(MEGATRON, tensor=2, pipeline=2, data=2, sequence=True, tied=True)

LAYOUTS = [
    replace(MEGATRON, data=2, recompute="full"),
    CUBE,
    replace(SGD, tensor=2, pipeline=2, clipped=False),
]
FURTHER = [
    MEGATRON,
    SGD,
    replace(MEGATRON, tensor=2, recompute="selective"),
    replace(MEGATRON, tensor=2, sequence=True, documents=True),
    replace(MEGATRON, pipeline=2, tied=True, documents=True),
    replace(MEGATRON, pipeline=2, schedule="interleaved", documents=True),
    replace(MEGATRON, pipeline=2, data=2, schedule="interleaved", micro_batches=4, tied=True),
    replace(MEGATRON, pipeline=4, micro_batches=4),
    replace(MEGATRON, data=4, data_mode="ddp"),
    replace(SGD, data=2),
    replace(SGD, tensor=2),
    replace(SGD, pipeline=2),
    replace(SGD, tensor=2, pipeline=2, data=2, sequence=True),
]


@cache
def reference(case: Case) -> Outcome:
    """The run of the torch engine on one rank that `case` must agree with."""
    return parity.run_case(case.reference)


def check(case: Case) -> None:
    expected, found = reference(case), parity.run_case(case)
    assert parity.violations(case, expected, found) == []
    relative = [abs(a.loss - b.loss) / abs(a.loss) for a, b in zip(expected.steps, found.steps, strict=True)]
    assert max(relative) <= 1e-5
    assert set(found.state) == set(expected.state)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_megatron_layout_equals_torch_on_one_rank(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("case", FURTHER, ids=str)
def test_megatron_further_layout_equals_torch_on_one_rank(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("sequence", [False, True])
def test_megatron_bf16_equals_torch_in_bf16(sequence: bool) -> None:
    """Under SGD: AdamW enlarges rounding until torch's own layouts differ by 3 % in a norm of these twenty steps."""
    case = replace(SGD, tensor=2, data=2, sequence=sequence, precision="bf16")
    expected, found = (parity.run_case(one).steps for one in (case.reference, case))
    assert [step.loss for step in found] == pytest.approx([step.loss for step in expected], rel=2e-4)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in expected], rel=5e-3)


@contextmanager
def gradients_doubled(engine: Any) -> Iterator[None]:
    updater = engine._updater
    prepare = updater.prepare

    def doubling() -> None:
        prepare()
        for gradient in updater.gradients():
            gradient.tensor.mul_(2)

    with patch.object(updater, "prepare", doubling):
        yield


@contextmanager
def stage_left_out_of_norm(engine: Any) -> Iterator[None]:
    squared_norm = clip.squared_norm
    counts = 0 if engine.mesh.at.pipeline == 1 else 1

    def of_other_stages(gradients: Sequence[clip.Gradient], rank: int, device: torch.device) -> torch.Tensor:
        return counts * squared_norm(gradients, rank, device)

    with patch.object(clip, "squared_norm", of_other_stages):
        yield


@contextmanager
def mean_of_means(engine: Any) -> Iterator[None]:
    run, losses = type(engine)._loss, engine._losses

    def over_own_count(micro: Batch, logits: torch.Tensor) -> Any:
        whole, losses.count = losses.count, (micro.targets != -100).sum() * engine.layout.data * 2
        try:
            return run(engine, micro, logits)
        finally:
            losses.count = whole

    with patch.object(engine, "_loss", over_own_count):
        yield


Fault = Callable[[Any], AbstractContextManager[None]]


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (gradients_doubled, replace(SGD, clipped=False)),
        (stage_left_out_of_norm, replace(SGD, pipeline=2)),
        (mean_of_means, replace(SGD, data=2, clipped=False)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_megatron_planted_fault_is_found_in_weights(fault: Fault, case: Case) -> None:
    steps = range(3)
    expected = parity.run_case(case.reference, steps=steps)
    found = parity.violations(case, expected, parity.run_case(case, steps=steps, fault=fault))
    assert any(text.startswith("weight") for text in found), found


STOP, END = 2, 4


def test_megatron_restored_state_continues_bitwise_and_in_torch() -> None:
    whole = parity.run_case(CUBE, steps=range(END))
    half = parity.run_case(CUBE, steps=range(STOP))
    rest = parity.run_case(CUBE, steps=range(STOP, END), start=half.state)
    assert rest.steps == whole.steps[STOP:]
    assert parity.differing(rest.state, whole.state) == []
    elsewhere = parity.run_case(CUBE.reference, steps=range(STOP, END), start=half.state)
    assert parity.violations(CUBE, whole, Outcome(half.steps + elsewhere.steps, elsewhere.state)) == []


def _life_of_an_engine(case: Case) -> tuple[bool, bool, StepResult, bool, Evaluation, StepResult]:
    """What happens to the state before an update and in a step that is skipped, and what evaluation returns."""
    engine, rank = parity.make_engine(case), dist.get_rank()
    before = parity.held_shards(engine)
    seen: list[list[parity.HeldShard]] = []
    batch = parity.rank_batch(case, 0, engine.layout, rank)
    losses = engine.evaluate(batch)
    step = engine.step(batch, 1e-3, lambda: seen.append(parity.held_shards(engine)))
    unchanged = len(seen) == 1 and same(seen[0], before)
    after = parity.held_shards(engine)
    weight = next(shard.local for name, shard in engine.state().items() if name.endswith("mlp.down.weight"))
    good = weight.clone()
    if rank == 0:
        weight.view(-1)[0] = torch.nan
    engine.restored()
    spoilt = parity.held_shards(engine)
    skipped = engine.step(batch, 1.0)
    nothing_done = same(parity.held_shards(engine), spoilt)
    weight.copy_(good)
    engine.restored()
    again = same(parity.held_shards(engine), after)
    engine.close()
    return unchanged and again, not same(after, before), skipped, nothing_done, losses, step


def same(a: list[parity.HeldShard], b: list[parity.HeldShard]) -> bool:
    return all(parity.equal_bits(x.values, y.values) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", [replace(MEGATRON, data=2)], ids=str)
def test_megatron_skipped_step_changes_nothing(case: Case) -> None:
    for unchanged, changed, skipped, nothing_done, losses, trained in run_ranks(
        case.world_size, _life_of_an_engine, case, deadline=280.0
    ):
        assert unchanged
        assert changed
        assert skipped.skipped
        assert nothing_done
        assert losses.tokens == trained.tokens
        assert losses.loss_sum / losses.tokens == pytest.approx(trained.loss, rel=1e-6)


FAMILIES: dict[str, dict[str, object]] = {
    "gpt": {
        "norm": "layer",
        "activation": "gelu_tanh",
        "position": "learned",
        "kv_heads": None,
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    "qwen2": {"qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"qk_norm": "head", "head_dim": 8},
    "partial rotary, z-loss": {"rotary_fraction": 0.4, "z_loss": 1e-2, "activation": "gelu"},
}


def _family(case: Case, change: dict[str, object]) -> tuple[list[StepResult], list[parity.HeldShard]]:
    spec = parity.model_spec
    with patch.object(parity, "model_spec", lambda case: type(spec(case))(**{**spec(case).model_dump(), **change})):
        engine = parity.make_engine(case)
        steps = [parity.train_step(engine, case, step) for step in range(3)]
    shards = parity.held_shards(engine)
    engine.close()
    return steps, shards


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_model_family_equals_torch(family: str) -> None:
    case = replace(SGD, tensor=2, sequence=True, documents=True)
    runs = []
    for one in (case.reference, case):
        ranks = run_ranks(one.world_size, _family, one, FAMILIES[family], deadline=280.0)
        runs.append(Outcome(ranks[0][0], parity.assemble([shards for _, shards in ranks])))
    found = parity.violations(case, *runs)
    # Softmax does not see what is added to all keys of a query alike: the gradient of their bias is rounding alone, and
    # where rotary positions turn it, little more.
    bound = float("inf") if FAMILIES[family].get("position") == "learned" else 1e-5
    keys = [text for text in found if "attention.key.bias" in text]
    assert [text for text in found if text not in keys] == []
    assert all(float(text.rpartition(" ")[2]) <= bound for text in keys), keys
