"""What the torch engine promises besides numbers that do not depend on the layout."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch, EngineConfig, Evaluation, StepResult
from keepwarm.parallel.errors import EngineUnavailable, LayoutError
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.native.engine import TorchEngine
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.model.decoder import Decoder
from tests.support.parity import Case, State, equal_bits, make_engine, model_spec, rank_batch
from tests.support.ranks import run_ranks

CUBE = Case(tensor=2, pipeline=2, data=2, sequence=True, tied=True, optimizer="adamw")
LR = 1e-3


def engine_of(
    case: Case | None = None,
    *,
    parallel: ParallelSpec | None = None,
    optimizer: OptimizerSpec | None = None,
    numerics: NumericsSpec | None = None,
) -> TorchEngine:
    spec = parallel or ParallelSpec()
    return TorchEngine(
        EngineConfig(
            model=Decoder(model_spec(case or Case()), 1),
            parallel=spec,
            optimizer=optimizer or OptimizerSpec(),
            numerics=numerics or NumericsSpec(),
            layout=Layout.of(spec),
            device=torch.device("cpu"),
            timeout=timedelta(seconds=60),
        )
    )


@pytest.fixture
def alone() -> Iterator[TorchEngine]:
    engine = engine_of()
    yield engine
    engine.close()


def copy_of(engine: TorchEngine) -> State:
    return {name: shard.local.detach().clone() for name, shard in engine.state().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(equal_bits(a[name], b[name]) for name in a)


def batch_of(step: int) -> Batch:
    return rank_batch(Case(), step, Layout.of(ParallelSpec()), 0)


def test_torch_engine_state_is_complete_from_construction(alone: TorchEngine) -> None:
    state = alone.state()
    weights = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    moments = {f"optimizer.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in weights}
    assert set(state) == {f"model.{name}" for name in weights} | moments | {"optimizer.step"}
    assert all(name == shard.name for name, shard in state.items())
    assert not any(state[name].local.any() for name in moments | {"optimizer.step"})
    before = {name: shard.local for name, shard in state.items()}
    alone.step(batch_of(0), LR)
    after = alone.state()
    assert all(after[name].local.data_ptr() == local.data_ptr() for name, local in before.items()), "shards must live"
    assert int(after["optimizer.step"].local) == 1


def test_torch_engine_sgd_momentum_holds_one_moment() -> None:
    engine = engine_of(optimizer=OptimizerSpec(name="sgd", momentum=0.9))
    assert {name.split(".")[1] for name in engine.state() if name.startswith("optimizer")} == {"momentum", "step"}
    engine.close()


def test_torch_engine_before_update_comes_once_before_changes(alone: TorchEngine) -> None:
    start, seen = copy_of(alone), []
    alone.step(batch_of(0), LR, before_update=lambda: seen.append(copy_of(alone)))
    assert len(seen) == 1
    assert same(seen[0], start)
    assert not same(copy_of(alone), start)


def test_torch_engine_undecayed_weights_stand_still_without_gradient() -> None:
    optimizer = OptimizerSpec(weight_decay=0.5, decay_embeddings=False)
    engine = engine_of(optimizer=optimizer)
    start = copy_of(engine)
    tokens = torch.zeros(1, 1, 8, dtype=torch.int64)
    engine.step(Batch(tokens=tokens, targets=tokens), LR)
    after = copy_of(engine)
    assert equal_bits(after["model.embedding.weight"][1:], start["model.embedding.weight"][1:])
    engine.close()


def test_torch_engine_step_without_targets_is_skipped(alone: TorchEngine) -> None:
    start = copy_of(alone)
    batch = batch_of(0)
    result = alone.step(replace(batch, targets=torch.full_like(batch.targets, IGNORED)), LR)
    assert result.skipped
    assert result.tokens == 0
    assert same(copy_of(alone), start)
    assert not alone.step(batch, LR).skipped


def _one_rank_breaks(case: Case) -> tuple[StepResult, bool, StepResult]:
    engine = make_engine(case)
    start = copy_of(engine)
    broken = next(shard for name, shard in engine.state().items() if name.endswith("down.weight"))
    healthy = broken.local.detach().clone()
    if dist.get_rank() in broken.replicas and dist.get_rank() == dist.get_world_size() - 1:
        broken.local.detach().fill_(torch.inf)
    engine.restored()
    first = engine.step(rank_batch(case, 0, engine.layout, dist.get_rank()), LR)
    broken.local.detach().copy_(healthy)
    engine.restored()
    unchanged = same(copy_of(engine), start)
    second = engine.step(rank_batch(case, 1, engine.layout, dist.get_rank()), LR)
    engine.close()
    return first, unchanged, second


@pytest.mark.dist
def test_torch_engine_bad_step_of_one_rank_is_skipped_by_all() -> None:
    results = run_ranks(8, _one_rank_breaks, CUBE)
    assert all(first.skipped and unchanged and not second.skipped for first, unchanged, second in results)
    assert len({second for _, _, second in results}) == 1


def _restore_and_go_on(case: Case) -> bool:
    """Steps 0 to 3, against 0 to 1 in one engine and 2 to 3 in another that starts from its state."""
    whole, first, second = make_engine(case), make_engine(case), make_engine(case)
    batches = [rank_batch(case, step, whole.layout, dist.get_rank()) for step in range(4)]
    for batch in batches:
        whole.step(batch, LR)
    for batch in batches[:2]:
        first.step(batch, LR)
        second.step(batch, 10 * LR)  # What it has learnt must be overwritten.
    saved = copy_of(first)
    for name, shard in second.state().items():
        shard.local.detach().copy_(saved[name])
    second.restored()
    for batch in batches[2:]:
        second.step(batch, LR)
    equal = same(copy_of(whole), copy_of(second))
    for engine in (whole, first, second):
        engine.close()
    return equal


@pytest.mark.dist
@pytest.mark.parametrize(
    "case",
    [
        replace(CUBE, precision="fp32"),
        Case(data=2, data_mode="keep", optimizer="adamw", precision="fp32"),
        Case(data=2, precision="fp32"),
    ],
    ids=str,
)
def test_torch_engine_restored_state_continues_bitwise(case: Case) -> None:
    assert all(run_ranks(case.world_size, _restore_and_go_on, case))


def _grow(case: Case) -> tuple[list[StepResult], Evaluation, bool]:
    """Steps of two, four and two micro-batches, and between them an evaluation of another shape."""
    engine = make_engine(case)
    steps, evaluated = [], Evaluation(sums={}, tokens=0)
    for step, micro_batches in enumerate((2, 4, 2)):
        batch = rank_batch(case, step, engine.layout, dist.get_rank())
        grown = Batch(tokens=batch.tokens[:micro_batches], targets=batch.targets[:micro_batches])
        steps.append(engine.step(grown, LR))
        before = copy_of(engine)
        evaluated = engine.evaluate(Batch(tokens=batch.tokens[:1], targets=batch.targets[:1]))
    unchanged = same(copy_of(engine), before)
    engine.close()
    return steps, evaluated, unchanged


@pytest.mark.dist
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
def test_torch_engine_number_of_micro_batches_may_change(schedule: str) -> None:
    case = Case(pipeline=2, schedule=schedule)
    (expected, evaluated, _), *_ = run_ranks(1, _grow, case.reference)
    for steps, score, unchanged in run_ranks(2, _grow, case):
        assert [result.loss for result in steps] == pytest.approx([result.loss for result in expected], rel=1e-12)
        assert score.loss_sum == pytest.approx(evaluated.loss_sum, rel=1e-12)
        assert score.tokens == evaluated.tokens
        assert unchanged


def _tiny_dims() -> tuple[list[StepResult], int]:
    """A QK norm of six features over four ranks: shards of 2, 2, 2 and 0."""
    spec = ParallelSpec(data=dist.get_world_size())
    model = model_spec(Case()).model_copy(update={"head_dim": 6, "qk_norm": "head"})
    engine = TorchEngine(
        EngineConfig(
            model=Decoder(model, 1),
            parallel=spec,
            optimizer=OptimizerSpec(),
            numerics=NumericsSpec(precision="fp64"),
            layout=Layout.of(spec),
            device=torch.device("cpu"),
            timeout=timedelta(seconds=60),
        )
    )
    case = Case(data=spec.data, micro_batches=2)
    steps = [engine.step(rank_batch(case, step, engine.layout, dist.get_rank()), LR) for step in range(3)]
    empty = sum(shard.local.numel() == 0 for shard in engine.state().values())
    engine.close()
    return steps, empty


@pytest.mark.dist
def test_torch_engine_ranks_without_a_parameter_shard_train() -> None:
    ((expected, none),) = run_ranks(1, _tiny_dims)
    results = run_ranks(4, _tiny_dims)
    assert none == 0
    assert results[3][1] > 0
    for steps, _ in results:
        assert [result.loss for result in steps] == pytest.approx([result.loss for result in expected], rel=1e-9)
        assert [result.grad_norm for result in steps] == pytest.approx([r.grad_norm for r in expected], rel=1e-9)


def _in_bf16(parallel: ParallelSpec) -> tuple[list[float], set[str]]:
    engine = engine_of(parallel=parallel, numerics=NumericsSpec(precision="bf16"))
    case = Case(tensor=parallel.tensor, pipeline=parallel.pipeline, data=parallel.data)
    rank = dist.get_rank() if dist.is_initialized() else 0
    losses = [engine.step(rank_batch(case, 0, engine.layout, rank), LR).loss for _ in range(4)]
    kept = {str(shard.local.dtype) for name, shard in engine.state().items() if name != "optimizer.step"}
    engine.close()
    return losses, kept


def test_torch_engine_bf16_on_one_rank_needs_no_process_group() -> None:
    losses, kept = _in_bf16(ParallelSpec())
    assert kept == {"torch.float32"}
    assert losses[-1] < losses[0]
    assert not dist.is_initialized()
    exact = engine_of()
    loss = exact.step(batch_of(0), LR).loss
    exact.close()
    assert losses[0] != loss
    assert losses[0] == pytest.approx(loss, rel=1e-2)


@pytest.mark.dist
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "data"])
def test_torch_engine_bf16_on_every_axis_stays_close(axis: str) -> None:
    alone, _ = _in_bf16(ParallelSpec())
    for losses, kept in run_ranks(2, _in_bf16, ParallelSpec.model_validate({axis: 2})):
        assert losses == pytest.approx(alone, rel=2e-3)
        assert kept == {"torch.float32"}


def test_torch_engine_recompute_and_compile_change_no_number(alone: TorchEngine) -> None:
    expected = [alone.step(batch_of(step), LR) for step in range(3)]
    for recompute in ("selective", "full"):
        engine = engine_of(numerics=NumericsSpec.model_validate({"recompute": recompute}))
        assert [engine.step(batch_of(step), LR) for step in range(3)] == expected
        engine.close()


def _too_few_micro_batches() -> None:
    case = Case(pipeline=2, micro_batches=1)
    engine = make_engine(case)
    try:
        with pytest.raises(LayoutError, match="needs at least 2 micro-batches per data-parallel rank, got 1"):
            engine.step(rank_batch(case, 0, engine.layout, dist.get_rank()), LR)
    finally:
        engine.close()


@pytest.mark.dist
def test_torch_engine_too_few_micro_batches_are_refused() -> None:
    run_ranks(2, _too_few_micro_batches)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelSpec(data=2), "the layout data 2 x pipeline 1 x tensor 1 has 2 ranks, but 1 are running"),
        (ParallelSpec(tensor=3), "model.heads = 4 does not divide by parallel.tensor = 3"),
        (ParallelSpec(data=4, data_mode="hsdp"), "hsdp needs parallel.shard_size, a divisor of parallel.data = 4"),
        (ParallelSpec(data=4, shard_size=2), "parallel.shard_size belongs to data_mode hsdp, not to fsdp"),
    ],
)
def test_torch_engine_impossible_layout_is_refused(parallel: ParallelSpec, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        engine_of(parallel=parallel)


def test_torch_engine_missing_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(EngineUnavailable, match=r"from source.*github\.com/NVIDIA/apex"):
        engine_of(optimizer=OptimizerSpec(implementation="apex"))
