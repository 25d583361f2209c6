"""Models of transformers compute in every layout what they compute on one rank, in three micro-batches."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.support.parity import Outcome, differing
from tests.support.transformers.models import Run, spec_of, train
from tests.trainer.model.test_transformers import ALL, FAMILIES

pytestmark = pytest.mark.dist

COVERING = Run(tensor=2, pipeline=2, sequence=True, documents=True, recompute="selective")
ONE_BY_ONE = [
    Run(pipeline=2),
    Run(pipeline=2, schedule="interleaved", optimizer="adamw"),
    Run(pipeline=2, schedule="zero_bubble"),
    Run(tensor=2),
    Run(tensor=2, sequence=True, documents=True),
    Run(data=2, recompute="full"),
    Run(data=2, tensor=2, sequence=True, optimizer="adamw"),
]


@cache
def on_one_rank(family: str, run: Run) -> Outcome:
    return train(spec_of(family), run)


def check(family: str, run: Run) -> None:
    """Compare with one rank.

    AdamW turns rounding of small gradients into differences of weights: those of a key's bias are nothing else.
    """
    within = 1e-4 if run.optimizer == "adamw" else 1e-5
    alone = replace(Run(), documents=run.documents, optimizer=run.optimizer, precision=run.precision)
    expected, found = on_one_rank(family, alone), train(spec_of(family), run)
    for one, other in zip(expected.steps, found.steps, strict=True):
        assert (other.loss, other.grad_norm) == pytest.approx((one.loss, one.grad_norm), rel=1e-5)
        assert other.tokens == one.tokens
    assert expected.state.keys() == found.state.keys()
    for name, value in expected.state.items():
        if name.startswith("model.") and not name.endswith("attention.key.bias"):
            assert torch.linalg.vector_norm(found.state[name] - value) <= within * torch.linalg.vector_norm(value), name


@pytest.mark.parametrize("family", ALL)
def test_family_in_a_covering_layout_equals_one_rank(family: str) -> None:
    check(family, COVERING)


@pytest.mark.parametrize("run", ONE_BY_ONE, ids=lambda run: f"{run.tensor}x{run.pipeline}x{run.data}-{run.schedule}")
@pytest.mark.parametrize(
    "family", ["phi3", *(pytest.param(one, marks=pytest.mark.long) for one in FAMILIES if one != "phi3")]
)
def test_family_in_one_dimension_equals_one_rank(family: str, run: Run) -> None:
    check(family, run)


def test_training_goes_on_bitwise_from_the_state_of_a_step() -> None:
    run = replace(COVERING, optimizer="adamw", steps=4)
    whole, half = train(spec_of("gemma3_text"), run), train(spec_of("gemma3_text"), replace(run, steps=2))
    again = train(spec_of("gemma3_text"), run, start=half.state, first=2)
    assert again.steps == whole.steps[2:]
    assert differing(again.state, whole.state) == []


def test_buffers_of_a_state_come_back_and_stay_equal_on_all_ranks_that_hold_them() -> None:
    spec = spec_of("apertus")
    run = Run(tensor=2, pipeline=2, data=2, sequence=True, documents=True, precision="bf16", optimizer="adamw", steps=2)
    start = train(spec, replace(run, steps=1)).state
    buffers = {f"model.{name}" for name in spec.buffers(range(spec.layers))}
    assert len(buffers) == 2 * spec.layers
    assert buffers <= start.keys()
    assert not any(f"optimizer.exp_avg.{name.removeprefix('model.')}" in start for name in buffers)
    # Other numbers than those of the class, so that only the state can have brought them.
    changed = {name: value * 3 if name in buffers else value for name, value in start.items()}
    one, other, plain = (train(spec, run, start=state, first=1) for state in (changed, changed, start))
    assert differing(one.state, other.state) == []
    assert all(torch.equal(one.state[name], changed[name]) for name in buffers)
    assert one.steps == other.steps
    assert one.steps[0].loss != plain.steps[0].loss


def test_bf16_computes_near_fp32() -> None:
    low = train(spec_of("gemma3_text"), Run(precision="bf16", data=2))
    for one, other in zip(on_one_rank("gemma3_text", Run()).steps, low.steps, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=2e-2)
