"""Learning-rate curves: their values at every boundary, their shape, and what is saved of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from keepwarm.trainer.job.curve import AnnealableCurve, Curve, LrSpec, load_curve
from keepwarm.trainer.job.learning_rate import WarmedCurve

STEPS = 1000
RECORDED = json.loads((Path(__file__).parent / "golden" / "curves.json").read_text())
"""Clauses with the values and the saved state of their curves, as the first version computed them."""


def curve(**clause: object) -> Curve:
    falls = {} if clause.get("schedule") == "constant" else {"min": 0.1}
    return LrSpec.model_validate({"max": 1.0, "warmup": 0.01} | falls | clause).curve(STEPS)


@pytest.mark.parametrize(
    ("clause", "values"),
    [
        ({"schedule": "constant"}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 999: 1.0}),
        ({"schedule": "linear"}, {0: 0.1, 9: 1.0, 10: 1.0, 505: 0.55, 1000: 0.1}),
        ({"schedule": "cosine"}, {9: 1.0, 10: 1.0, 505: 0.55, 1000: 0.1}),
        ({"schedule": "cosine", "warmup": 0.0}, {0: 1.0, 500: 0.55, 1000: 0.1}),
        ({"schedule": "inverse_sqrt"}, {9: 1.0, 10: 1.0, 40: 0.5, 1000: 0.1}),
        ({"schedule": "wsd", "anneal": 0.2}, {9: 1.0, 10: 1.0, 800: 1.0, 900: 0.55, 1000: 0.1}),
        (
            {"schedule": "infinite", "constant": 0.4, "anneal": 0.2, "cooldown_end": 0.61},
            {9: 1.0, 10: 1.0, 310: 0.7, 610: 0.4, 800: 0.4, 900: math.sqrt(0.4 * 0.1), 1000: 0.1},
        ),
        (
            {"schedule": "infinite", "constant": 0.4, "cooldown": "linear", "cooldown_end": 0.61},
            {10: 1.0, 310: 0.7, 610: 0.4, 999: 0.4},
        ),
        (
            {"schedule": "infinite", "constant": 0.4, "cooldown": "inverse_sqrt", "cooldown_end": 0.61},
            {10: 1.0, 310: 1 - 0.6 * (1 / math.sqrt(6) - 1) / (1 / math.sqrt(11) - 1), 610: 0.4},
        ),
    ],
)
def test_curve_has_expected_values_at_boundaries(clause: dict[str, object], values: dict[int, float]) -> None:
    made = curve(**clause)
    assert {step: made.at(step) for step in values} == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("clause", [{"anneal": 0.0}, {"anneal": 0.85}, {"anneal": 0.15}])
def test_curve_infinite_matches_published_values(clause: dict[str, float]) -> None:
    """Singh et al. (2025), language models: 3e-4 to 1.65e-4 at 60 %, annealed to 3e-5."""
    spec = {"schedule": "infinite", "max": 3e-4, "constant": 1.65e-4, "min": 3e-5, "cooldown_end": 0.6} | clause
    if clause["anneal"] > 0.4:
        with pytest.raises(ValidationError, match="cooldown_end <= 1 - anneal"):
            curve(**spec)
        return
    made = curve(**spec)
    assert made.at(600) == 1.65e-4
    assert made.at(1000) == pytest.approx(3e-5 if clause["anneal"] else 1.65e-4, rel=1e-12)


@st.composite
def specs(draw: st.DrawFn) -> LrSpec:
    kind = draw(st.sampled_from(["constant", "linear", "cosine", "inverse_sqrt", "wsd", "infinite"]))
    peak = draw(st.floats(1e-6, 1.0))
    floor = peak * draw(st.floats(0.01, 1.0))
    warmup = draw(st.floats(0, 0.3))
    anneal = draw(st.floats(0, 0.3))
    clause: dict[str, object] = {"schedule": kind, "max": peak, "warmup": warmup}
    if kind != "constant":
        clause["min"] = floor
    if kind in ("wsd", "infinite"):
        clause["anneal"] = anneal
    if kind == "infinite":
        clause["constant"] = floor + (peak - floor) * draw(st.floats(0, 1))
        clause["cooldown_end"] = draw(st.floats(0.4, 0.6))
        clause["cooldown"] = draw(st.sampled_from(["cosine", "linear", "inverse_sqrt"]))
    return LrSpec.model_validate(clause)


@given(spec=specs(), steps=st.integers(1, 10**7), data=st.data())
def test_curve_stays_in_range_rises_then_falls_and_survives_json(spec: LrSpec, steps: int, data: st.DataObject) -> None:
    made = spec.curve(steps)
    assert isinstance(made, WarmedCurve)
    assert load_curve(json.loads(json.dumps(made.save()))) == made
    step = data.draw(st.integers(0, steps))
    here, there = made.at(step), made.at(step + 1)
    assert 0 < here <= spec.max * (1 + 1e-12)
    if step + 1 < made.warmup_end:
        assert there >= here
    elif step >= made.warmup_end:
        assert there <= here * (1 + 1e-12)
        assert here >= getattr(spec, "min", 0) * (1 - 1e-12)
    assert made.at(steps) == made.at(steps + 5)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt", "wsd", "infinite"])
def test_curve_is_continuous(kind: str) -> None:
    """No jump larger than the steepest piece makes in one of its steps."""
    clause = {"infinite": {"constant": 0.4, "anneal": 0.2}, "wsd": {"anneal": 0.2}}.get(kind, {})
    floor = {} if kind == "constant" else {"min": 0.1}
    made = LrSpec.model_validate({"schedule": kind, "max": 1.0} | floor | clause).curve(100_000)
    assert isinstance(made, WarmedCurve)
    jumps = [abs(made.at(step + 1) - made.at(step)) for step in range(100_000)]
    assert max(jumps) <= 1 / made.warmup_end + 1e-12


@pytest.mark.parametrize(
    ("clause", "words"),
    [
        ({"min": 2.0}, "min 2.0 is above max 1.0"),
        ({"schedule": "infinite"}, r"constant\n.*Field required"),
        ({"schedule": "infinite", "constant": 2.0}, "between min and max"),
        ({"schedule": "infinite", "constant": 0.5, "min": 0.0, "anneal": 0.1}, "min above 0"),
        ({"constant": 0.5}, r"constant\n.*Extra inputs are not permitted"),
        ({"schedule": "piecewise", "min": 0.0, "points": ((0.0, 1.0), (1.0, 0.0))}, r"min\n.*Extra inputs"),
        ({"schedule": "wsd", "warmup": 0.6, "anneal": 0.6}, "warmup \\+ anneal <= 1"),
    ],
)
def test_curve_invalid_clause_is_refused(clause: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        curve(**clause)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda one: f"{one['clause']['schedule']}-{one['steps']}")
def test_curve_recorded_clauses_give_same_bits(recorded: dict[str, Any]) -> None:
    made = LrSpec.model_validate_json(json.dumps(recorded["clause"])).curve(recorded["steps"])
    for one in (made, load_curve(recorded["saved"]), load_curve(json.loads(json.dumps(made.save())))):
        assert one == made
        assert {step: one.at(int(step)).hex() for step in recorded["at"]} == recorded["at"]
    assert made.save().items() <= recorded["saved"].items()
    phase = made.constant_phase if isinstance(made, AnnealableCurve) else range(0)
    assert [phase.start, phase.stop] == recorded["constant_phase"]
    assert set(made.corners) >= {0, recorded["steps"] - 1}


@pytest.mark.parametrize("recorded", [one for one in RECORDED if one["constant_phase"] != [0, 0]])
def test_curve_anneal_begins_at_the_constant_rate(recorded: dict[str, Any]) -> None:
    made = load_curve(recorded["saved"])
    assert isinstance(made, AnnealableCurve)
    annealed = LrSpec.model_validate(made.anneal()).curve(1000)
    assert annealed.at(0) == made.at(made.constant_phase.start)
    assert annealed.at(1000) <= annealed.at(500) <= annealed.at(0)
