"""A28: forgetting, transfer, flips, retainability and the stability gap on fixtures worked out by hand."""

import numpy as np
import pytest

from trainer import evaluation_metrics as metrics

pytestmark = pytest.mark.science

P = [
    [5.0, 6.0, 7.0],
    [1.0, 5.5, 6.0],
    [2.5, 2.0, 6.5],
    [2.0, 2.5, 3.0],
]
"""Rows: before, then after the stages of domains 1, 2, 3."""


def test_the_matrix_gives_what_its_definitions_say() -> None:
    assert metrics.last_losses(P).tolist() == [2.0, 2.5, 3.0]
    assert metrics.forgetting(P).tolist() == [1.0, 0.5, 0.0]
    assert metrics.forgetting_since(P).tolist() == [-3.0, -3.5, -4.0]
    assert metrics.forgetting_since(P, 2).tolist() == [-0.5, 0.5, -3.5]
    assert metrics.learned_losses(P).tolist() == [1.0, 2.0, 3.0]
    assert metrics.backward_transfer(P) == -0.75
    assert metrics.forward_transfer(P) == 0.5
    assert metrics.gain_over_standalone(P, [1.5, 1.5, 3.0]).tolist() == [0.5, -0.5, 0.0]


@pytest.mark.parametrize("bad", [[[1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0], [1.0]]])
def test_a_matrix_of_another_shape_is_refused(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"shape|matrix of"):
        metrics.backward_transfer(bad)


def test_negative_flips() -> None:
    assert metrics.negative_flips([True, True, False, True], [True, False, True, False]) == 0.5
    with pytest.raises(ValueError, match="the same items"):
        metrics.negative_flips([True], [True, False])


def test_the_stability_gap() -> None:
    steps = [0, 10, 20, 50, 100, 200]
    gap = metrics.stability_gap(steps, [1.5, 2.0, 2.25, 1.75, 1.5, 1.5])
    assert gap == metrics.StabilityGap(depth=0.75, worst_step=20, recovery_step=100)
    assert metrics.stability_gap(steps, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]).depth == 0
    assert metrics.stability_gap(steps, [1.5, 2.5, 2.25, 1.75, 1.6, 1.5]).recovery_step is None
    assert metrics.stability_gap(steps, [1.5, 2.5, 2.25, 1.75, 1.6, 1.5], 0.125).recovery_step == 100


@pytest.mark.parametrize("decay", [0.02, 0.1, 0.25])
def test_a_known_decay_of_retainability_is_recovered(decay: float) -> None:
    rng = np.random.default_rng(1)
    steps = np.unique(np.geomspace(1, 2000, 200).astype(int))
    log_likelihoods = np.full(2200, -8.0)
    peak = 105
    log_likelihoods[100:peak] = np.linspace(-8.0, -5.2, peak - 100)
    log_likelihoods[peak] = -5.0
    after = np.arange(1, 2200 - peak)
    log_likelihoods[peak + 1 :] = -8.0 + 3.0 * (1 - decay * np.log(after) + rng.normal(0, 0.1 * decay, len(after)))
    kept = metrics.retainability(log_likelihoods.tolist(), 100, steps.tolist(), 5)
    fit = metrics.fit_retainability(steps.tolist(), kept.tolist())
    assert fit.decay == pytest.approx(decay, rel=0.05)
    assert fit.intercept == pytest.approx(1, abs=0.05)
    assert fit.rmse < fit.exponential_rmse


def test_nothing_learned_has_no_retainability() -> None:
    with pytest.raises(ValueError, match="nothing was learned"):
        metrics.retainability([-1.0] * 20, 5, [1, 2], 5)
