"""What engines set for the whole process before they compute."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from keepwarm.parallel import step
from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.optimizer import clip
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.trainer.model.decoder import Decoder
from tests.support.parity import Case, equal_bits, make_engine, model_spec, train_step
from tests.support.ranks import run_ranks

DETERMINISTIC: Any = torch.utils.deterministic
SEQUENCE = Case(tensor=2, sequence=True, optimizer="adamw")

CONFIG = EngineConfig(
    model=Decoder(model_spec(Case()), 1),
    parallel=ParallelSpec(),
    optimizer=OptimizerSpec(),
    numerics=NumericsSpec(),
    layout=Layout.of(ParallelSpec()),
    device=torch.device("cuda", 0),
    timeout=timedelta(seconds=60),
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Put back what the tests set."""
    matmul = torch.backends.cuda.matmul
    reduced, tf32, convolutions = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32, _convolutions()
    filled = DETERMINISTIC.fill_uninitialized_memory
    repeatable = torch.are_deterministic_algorithms_enabled()
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32 = reduced, tf32
    torch.backends.cudnn.allow_tf32 = convolutions
    DETERMINISTIC.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(repeatable)


def _convolutions() -> bool:
    allowed: bool = torch.backends.cudnn.allow_tf32
    return allowed


def test_numerics_sums_of_bf16_products_are_not_reduced_in_bf16() -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    step.set_numerics(CONFIG)
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False


@pytest.mark.parametrize("tf32", [False, True])
def test_numerics_tf32_is_what_the_job_says(tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = not tf32
    step.set_numerics(replace(CONFIG, numerics=NumericsSpec(tf32=tf32)))
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert _convolutions() is tf32


def test_numerics_tf32_leaves_the_cpu_alone() -> None:
    before = torch.get_float32_matmul_precision()
    step.set_numerics(replace(CONFIG, numerics=NumericsSpec(tf32=True), device=torch.device("cpu")))
    assert torch.get_float32_matmul_precision() == before


def test_numerics_deterministic_does_not_fill_new_tensors() -> None:
    DETERMINISTIC.fill_uninitialized_memory = True
    step.set_numerics(replace(CONFIG, numerics=NumericsSpec(deterministic=True)))
    assert torch.are_deterministic_algorithms_enabled()
    assert DETERMINISTIC.fill_uninitialized_memory is False


def trained(coalesce: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Train two steps of a sequence-parallel layout. Return the state and how many all-reduces finished gradients."""
    finish, reduce, calls = clip.finish, dist.all_reduce, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return reduce(*arguments, **options)

    def finished(parameters: Any, **_: bool) -> None:
        dist.all_reduce = counted
        finish(parameters, coalesce=coalesce)
        dist.all_reduce = reduce

    clip.finish = finished
    try:
        engine = make_engine(SEQUENCE)
        for number in range(2):
            train_step(engine, SEQUENCE, number)
        state = {name: shard.local.detach().clone() for name, shard in engine.state().items()}
        engine.close()
    finally:
        clip.finish = finish
    return state, len(calls)


@pytest.mark.dist
def test_finish_coalesced_gradients_of_norms_are_the_same_bits_in_one_all_reduce() -> None:
    """Of two ranks the sum does not depend on its order."""
    alone, together = run_ranks(2, trained, False), run_ranks(2, trained, True)
    for (one, _), (other, calls) in zip(alone, together, strict=True):
        assert [name for name in one if not equal_bits(one[name], other[name])] == []
        assert calls == 2
