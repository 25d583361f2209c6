"""A9: the infinite schedule is its published formula, and its boundaries are in what is saved."""

import json
import math

import pytest

from keepwarm.trainer.job.curve import Curve, LrSpec, load_curve
from keepwarm.trainer.job.learning_rate import Infinite

pytestmark = pytest.mark.science

PEAK, CONSTANT, FLOOR, STEPS = 3e-4, 1.65e-4, 3e-5, 2000
WARM, COOL, HOLD = 20, 1200, 1700


def curve(cooldown: str = "cosine", anneal: float = 0.15) -> Curve:
    clause = {"schedule": "infinite", "max": PEAK, "constant": CONSTANT, "min": FLOOR, "cooldown": cooldown}
    return LrSpec.model_validate({**clause, "cooldown_end": 0.6, "anneal": anneal}).curve(STEPS)


def published(step: int, cooldown: str) -> float:
    if step <= WARM:
        return PEAK * step / WARM
    if step <= COOL:
        p = (step - WARM) / (COOL - WARM)
        if cooldown == "cosine":
            return CONSTANT + (PEAK - CONSTANT) / 2 * (1 + math.cos(math.pi * p))
        if cooldown == "linear":
            return PEAK - (PEAK - CONSTANT) * p
        f = (1 / math.sqrt(1 + 10 * p) - 1) / (1 / math.sqrt(11) - 1)
        return PEAK + (CONSTANT - PEAK) * f
    if step <= HOLD:
        return CONSTANT
    return CONSTANT * (FLOOR / CONSTANT) ** ((step - HOLD) / (STEPS - HOLD))


@pytest.mark.parametrize("cooldown", ["cosine", "linear", "inverse_sqrt"])
def test_a9_infinite_curve_equals_the_formula(cooldown: str) -> None:
    """The warm-up is one step ahead of the formula, so that the first step trains at all."""
    made = curve(cooldown)
    assert isinstance(made, Infinite)
    assert (made.warmup_end, made.cooldown_end, made.constant_end, made.end) == (WARM, COOL, HOLD, STEPS)
    for step in range(WARM, STEPS + 1):
        assert made.at(step) == pytest.approx(published(step, cooldown), rel=1e-12)
    assert [made.at(step) for step in (0, WARM - 1)] == pytest.approx([published(1, ""), published(WARM, "")])
    jumps = [abs(made.at(step + 1) - made.at(step)) for step in range(STEPS)]
    assert max(jumps) <= PEAK / WARM * (1 + 1e-9)


@pytest.mark.parametrize("cooldown", ["cosine", "linear", "inverse_sqrt"])
@pytest.mark.parametrize("at", [0, 10, WARM, 700, COOL, 1500, HOLD, 1999])
def test_a9_infinite_curve_restored_anywhere_continues(cooldown: str, at: int) -> None:
    made = curve(cooldown)
    restored = load_curve(json.loads(json.dumps(made.save())))
    assert [restored.at(step) for step in range(at, STEPS + 1)] == [made.at(step) for step in range(at, STEPS + 1)]


@pytest.mark.parametrize("steps", [10, 100, 5000])
def test_a9_anneal_begins_at_the_constant_rate(steps: int) -> None:
    clause = {"schedule": "infinite", "max": CONSTANT, "constant": CONSTANT, "min": FLOOR, "warmup": 0.0}
    anneal = LrSpec.model_validate({**clause, "cooldown_end": 0.0001, "anneal": 0.999}).curve(steps)
    assert curve(anneal=0.0).at(STEPS) == CONSTANT
    assert anneal.at(0) == CONSTANT
    assert anneal.at(steps) == pytest.approx(FLOOR, rel=1e-12)
    rates = [anneal.at(step) for step in range(steps + 1)]
    assert rates == sorted(rates, reverse=True)
