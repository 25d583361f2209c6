"""The comparison of layouts fails when the engine is wrong: four classical mistakes, made on purpose."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch
from keepwarm.parallel.native.engine import TorchEngine
from keepwarm.parallel.optimizer import clip
from keepwarm.parallel.parameter import ShardedParameter
from tests.support import parity
from tests.support.parity import Case

pytestmark = pytest.mark.dist

STEPS = range(3)
Fault = Callable[[TorchEngine], AbstractContextManager[None]]


@contextmanager
def gradients_doubled(engine: TorchEngine) -> Iterator[None]:
    finish = clip.finish

    def doubling(parameters: Iterable[ShardedParameter], *, coalesce: bool) -> None:
        held = list(parameters)
        finish(held, coalesce=coalesce)
        for one in held:
            if one.local.grad is not None:
                one.local.grad = 2 * one.local.grad

    with patch.object(clip, "finish", doubling):
        yield


@contextmanager
def stage_left_out_of_norm(engine: TorchEngine) -> Iterator[None]:
    squared_norm = clip.squared_norm
    counts = 0 if engine.layout.coordinates(dist.get_rank()).pipeline == 1 else 1

    def of_other_stages(gradients: Sequence[clip.Gradient], rank: int, device: torch.device) -> torch.Tensor:
        return counts * squared_norm(gradients, rank, device)

    with patch.object(clip, "squared_norm", of_other_stages):
        yield


@contextmanager
def tied_gradient_added_twice(engine: TorchEngine) -> Iterator[None]:
    summed = clip.sum_copies

    def doubled(gradient: torch.Tensor, group: dist.ProcessGroup) -> None:
        summed(gradient, group)
        gradient.mul_(2)

    with patch.object(clip, "sum_copies", doubled):
        yield


@contextmanager
def tied_gradient_twice_in_norm(engine: TorchEngine) -> Iterator[None]:
    squared_norm = clip.squared_norm
    on_last_stage = engine.layout.coordinates(dist.get_rank()).pipeline == engine.layout.pipeline - 1

    def of_each_copy(gradients: Sequence[clip.Gradient], rank: int, device: torch.device) -> torch.Tensor:
        tied = [one for one in gradients if len(one.replicas) == engine.layout.pipeline]
        again = squared_norm(tied, tied[0].replicas[0], device) if tied and on_last_stage else 0
        return squared_norm(gradients, rank, device) + again

    with patch.object(clip, "squared_norm", of_each_copy):
        yield


@contextmanager
def mean_of_means(engine: TorchEngine) -> Iterator[None]:
    forward, losses = engine._forward, engine._losses

    def over_own_count(micro: Batch) -> torch.Tensor:
        whole, losses.count = losses.count, (micro.targets != -100).sum() * engine.layout.data * 2
        try:
            return forward(micro)
        finally:
            losses.count = whole

    with patch.object(engine, "_forward", over_own_count):
        yield


@contextmanager
def nothing(engine: TorchEngine) -> Iterator[None]:
    yield


FAULTS: list[tuple[Fault, Case]] = [
    (gradients_doubled, Case(pipeline=2, data=2)),
    (stage_left_out_of_norm, Case(pipeline=2, clipped=True)),
    (tied_gradient_added_twice, Case(pipeline=2, tied=True)),
    (tied_gradient_twice_in_norm, Case(pipeline=2, tied=True, clipped=True)),
    (mean_of_means, Case(data=2)),
]


@pytest.mark.parametrize(("fault", "case"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_parity_planted_fault_is_found_in_weights(fault: Fault, case: Case, precision: str) -> None:
    case = replace(case, precision=precision)
    expected = parity.run_case(case.reference, steps=STEPS)
    assert parity.violations(case, expected, parity.run_case(case, steps=STEPS, fault=nothing)) == []
    found = parity.violations(case, expected, parity.run_case(case, steps=STEPS, fault=fault))
    assert any(text.startswith("weight") for text in found), found


def test_parity_adamw_hides_doubled_gradient_that_sgd_shows() -> None:
    """Why parity is checked with SGD as well."""
    case = Case(data=2, optimizer="adamw")
    expected = parity.run_case(case.reference, steps=STEPS)
    found = parity.violations(case, expected, parity.run_case(case, steps=STEPS, fault=gradients_doubled))
    assert any(text.startswith("norm") for text in found)
    errors = [float(text.rsplit(" ", 1)[1]) for text in found if text.startswith("weight")]
    assert all(error < 1e-3 for error in errors)
