"""What a step leaves behind: the same bits twice, a state that continues elsewhere, and nothing when it is skipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch, StepResult
from keepwarm.parallel.native.engine import TorchEngine
from keepwarm.parallel.optimizer import clip
from keepwarm.parallel.parameter import ShardedParameter
from keepwarm.parallel.targets import IGNORED
from tests.support import parity
from tests.support.parity import Case, HeldShard, Outcome
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

FULL = Case(tensor=2, pipeline=2, data=2, sequence=True, tied=True, clipped=True, optimizer="adamw", precision="fp32")
STOP, END = 3, 6


@pytest.fixture(scope="module")
def uninterrupted() -> Outcome:
    """Six steps of FULL."""
    return parity.run_case(FULL, steps=range(END))


@pytest.fixture(scope="module")
def stopped() -> Outcome:
    """Its first three."""
    return parity.run_case(FULL, steps=range(STOP))


def test_parity_state_same_layout_repeats_bitwise(uninterrupted: Outcome) -> None:
    again = parity.run_case(FULL, steps=range(END))
    assert again.steps == uninterrupted.steps
    assert parity.differing(again.state, uninterrupted.state) == []


def test_parity_state_restored_continues_bitwise(uninterrupted: Outcome, stopped: Outcome) -> None:
    continued = parity.run_case(FULL, steps=range(STOP, END), start=stopped.state)
    assert continued.steps == uninterrupted.steps[STOP:]
    assert parity.differing(continued.state, uninterrupted.state) == []


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 1, "pipeline": 1, "data": 1, "sequence": False},
        {"tensor": 1, "pipeline": 2, "data": 2, "sequence": False, "schedule": "interleaved", "data_mode": "ddp"},
    ],
    ids=["1x1x1", "1x2x2-interleaved-ddp"],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parity_state_restored_continues_in_another_layout(layout: dict[str, object], optimizer: str) -> None:
    here = Case(tensor=2, pipeline=2, tied=True, clipped=True, optimizer=optimizer)
    there = replace(here, **layout)  # type: ignore[arg-type]
    whole = parity.run_case(here.reference, steps=range(END))
    half = parity.run_case(here, steps=range(STOP))
    rest = parity.run_case(there, steps=range(STOP, END), start=half.state)
    assert rest.state["optimizer.step"] == END
    assert parity.violations(there, whole, Outcome(half.steps + rest.steps, rest.state)) == []


def test_parity_state_sgd_momentum_continues_bitwise() -> None:
    case = Case(pipeline=2, data=2, precision="fp32")
    whole = parity.run_case(case, steps=range(END))
    half = parity.run_case(case, steps=range(STOP))
    assert any(name.startswith("optimizer.momentum.") for name in half.state)
    rest = parity.run_case(case, steps=range(STOP, END), start=half.state)
    assert parity.differing(rest.state, whole.state) == []


def test_parity_state_is_complete_before_first_step(stopped: Outcome) -> None:
    fresh = parity.run_case(FULL, steps=range(0)).state
    assert {name: tensor.shape for name, tensor in fresh.items()} == {
        name: tensor.shape for name, tensor in stopped.state.items()
    }
    weights = [name.removeprefix("model.") for name in fresh if name.startswith("model.")]
    moments = {f"optimizer.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in weights}
    assert set(fresh) == {f"model.{name}" for name in weights} | moments | {"optimizer.step"}
    assert "embedding.weight" in weights
    assert "head.weight" not in weights


def _before_update(case: Case) -> list[tuple[int, bool, bool]]:
    """Per step: how often `before_update` was called, whether state was still the old, and whether it is new now."""
    engine = parity.make_engine(case)
    seen = []
    for step in range(2):
        before = parity.held_shards(engine)
        copies: list[list[HeldShard]] = []
        batch = parity.rank_batch(case, step, engine.layout, dist.get_rank())
        engine.step(
            batch, parity.learning_rate(case, step), lambda copies=copies: copies.append(parity.held_shards(engine))
        )
        unchanged = all(_same(copy, before) for copy in copies)
        seen.append((len(copies), unchanged, not _same(parity.held_shards(engine), before)))
    engine.close()
    return seen


def _same(a: list[HeldShard], b: list[HeldShard]) -> bool:
    return all(parity.equal_bits(x.values, y.values) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", [Case(), Case(pipeline=2, data=2, optimizer="adamw")], ids=str)
def test_parity_state_before_update_is_called_once_before_changes(case: Case) -> None:
    for seen in run_ranks(case.world_size, _before_update, case):
        assert seen == [(1, True, True), (1, True, True)]


@contextmanager
def _no_fault() -> Iterator[None]:
    yield


@contextmanager
def _infinite_gradient_on_the_last_rank() -> Iterator[None]:
    """One element of one gradient of one rank; the loss stays finite."""
    finish = clip.finish

    def spoil(parameters: list[ShardedParameter], *, coalesce: bool) -> None:
        finish(parameters, coalesce=coalesce)
        gradient = next(held.local.grad for held in parameters if held.replicas[0] == dist.get_rank())
        assert gradient is not None
        gradient.flatten()[0] = torch.inf

    last = dist.get_rank() == dist.get_world_size() - 1
    with patch.object(clip, "finish", spoil if last else finish):
        yield


def _skipped(case: Case, what: str) -> tuple[StepResult, bool, list[StepResult], list[HeldShard]]:
    """A bad step between steps 0 and 1: its result, whether it changed nothing, the other steps, the last state."""
    engine, rank = parity.make_engine(case), dist.get_rank()
    steps = [parity.train_step(engine, case, 0)]
    batch = parity.rank_batch(case, 9, engine.layout, rank)
    weight = next(shard.local for name, shard in engine.state().items() if name.endswith("mlp.down.weight"))
    good = weight.detach().clone()
    if what == "weight" and rank == 0:
        weight.detach()[0, 0] = torch.nan
    if what == "masked":
        batch = Batch(tokens=batch.tokens, targets=torch.full_like(batch.targets, IGNORED))
    before = parity.held_shards(engine)
    with _infinite_gradient_on_the_last_rank() if what == "gradient" else _no_fault():
        bad = engine.step(batch, 1.0)
    unchanged = _same(parity.held_shards(engine), before)
    weight.detach().copy_(good)
    engine.restored()
    steps.append(parity.train_step(engine, case, 1))
    shards = parity.held_shards(engine)
    engine.close()
    return bad, unchanged, steps, shards


@pytest.mark.parametrize("what", ["weight", "gradient", "masked"])
@pytest.mark.parametrize(
    "case",
    [Case(optimizer="adamw"), Case(tensor=2, pipeline=2, data=2, precision="fp32", clipped=True, optimizer="adamw")],
    ids=str,
)
def test_parity_state_bad_step_is_skipped_by_all_ranks(case: Case, what: str) -> None:
    expected = parity.run_case(case, steps=range(2))
    ranks = run_ranks(case.world_size, _skipped, case, what, deadline=200.0)
    for bad, unchanged, steps, _ in ranks:
        assert bad.skipped
        assert unchanged
        assert steps == expected.steps
    assert parity.differing(parity.assemble([shards for *_, shards in ranks]), expected.state) == []


def _build_twice(case: Case, other: Case) -> list[StepResult]:
    results = []
    for one in (case, other, case):
        engine: TorchEngine = parity.make_engine(one)
        results.append(parity.train_step(engine, one, 0))
        engine.close()
    return results


def test_parity_state_engines_of_two_layouts_run_in_one_process() -> None:
    first = Case(tensor=2, data=2, sequence=True, precision="fp32")
    other = Case(tensor=2, pipeline=2, precision="fp32")
    for before, _, after in run_ranks(4, _build_twice, first, other):
        assert before == after


@pytest.mark.parametrize(
    "case",
    [
        Case(engine="megatron", precision="fp32", data=2, clipped=True, optimizer="adamw"),
        Case(engine="deepspeed", precision="fp32", data=2, clipped=True),
        Case(pipeline=2, schedule="zero_bubble", z_loss=1e-2),
    ],
    ids=str,
)
def test_parity_state_batch_without_targets_is_skipped_in_every_engine(case: Case) -> None:
    expected = parity.run_case(case, steps=range(2))
    for bad, unchanged, steps, _ in run_ranks(case.world_size, _skipped, case, "masked", deadline=280.0):
        assert (bad.skipped, bad.tokens) == (True, 0)
        assert unchanged
        assert steps == expected.steps
