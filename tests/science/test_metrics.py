"""A28: forgetting, transfer and the stability gap on fixtures worked out by hand."""

import pytest

from keepwarm.trainer.continual import forgetting as metrics

pytestmark = pytest.mark.science

P = [
    [5.0, 6.0, 7.0],
    [1.0, 5.5, 6.0],
    [2.5, 2.0, 6.5],
    [2.0, 2.5, 3.0],
]
"""Rows: before, then after the stages of domains 1, 2, 3."""


def test_a28_forgetting_and_transfer_follow_their_definitions() -> None:
    assert [metrics.forgetting(domain) for domain in zip(*P, strict=True)] == [1.0, 0.5, 0.0]
    assert metrics.backward_transfer(P) == -0.75
    assert metrics.forward_transfer(P) == 0.5


@pytest.mark.parametrize("bad", [[[1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0], [1.0]]])
def test_a28_matrix_of_another_shape_is_refused(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"shape|matrix of"):
        metrics.backward_transfer(bad)


def test_a28_stability_gap_has_depth_and_recovery_step() -> None:
    steps = [0, 10, 20, 50, 100, 200]
    gap = metrics.stability_gap(steps, [1.5, 2.0, 2.25, 1.75, 1.5, 1.5])
    assert gap == metrics.StabilityGap(depth=0.75, worst_step=20, recovery_step=100)
    assert metrics.stability_gap(steps, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]).depth == 0
    assert metrics.stability_gap(steps, [1.5, 2.5, 2.25, 1.75, 1.6, 1.5]).recovery_step is None
    assert metrics.stability_gap(steps, [1.5, 2.5, 2.25, 1.75, 1.6, 1.5], 0.125).recovery_step == 100
