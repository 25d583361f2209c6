"""Scaled rotary frequencies: what they depend on, which specs may have them, and which layers use them."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from keepwarm.trainer.model.rotary import plain_frequencies, rotation_of, scaled_frequencies
from keepwarm.trainer.model.spec import ModelSpec, RopeScalingSpec

BASE: dict[str, Any] = {
    "layers": 4,
    "hidden_size": 32,
    "heads": 4,
    "ffn_size": 48,
    "vocabulary_size": 64,
    "max_sequence_length": 64,
}
LONG = {"short_factors": (1.0, 1.1, 1.2, 1.3), "long_factors": (2.0, 3.0, 4.0, 5.0)}


def spec(kind: str, **fields: Any) -> ModelSpec:
    scaling = RopeScalingSpec(**{"type": kind, "factor": 4.0, "original_max_sequence_length": 16, **fields})
    return ModelSpec(**BASE, rope_scaling=scaling)


def frequencies(model: ModelSpec, length: int) -> torch.Tensor:
    return scaled_frequencies(model, plain_frequencies(model.rotating, model.rope_theta, torch.float64), length)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_frequencies_lie_between_plain_and_divided_ones_at_any_length(kind: str) -> None:
    model = spec(kind, original_max_sequence_length=64)
    plain = plain_frequencies(8, 10000.0, torch.float64)
    found = frequencies(model, 8)
    assert torch.equal(found, frequencies(model, 500))
    assert (found <= plain * (1 + 1e-12)).all()
    assert (found >= plain / 4 * (1 - 1e-12)).all()
    # The longest wave is interpolated in full; all but `linear` leave the shortest alone.
    assert found[-1] == pytest.approx(plain[-1] / 4)
    assert found[0] == pytest.approx(plain[0] / 4 if kind == "linear" else plain[0])


def test_dynamic_frequencies_follow_the_length_of_the_sequence_beyond_the_original() -> None:
    model, plain = spec("dynamic"), plain_frequencies(8, 10000.0, torch.float64)
    assert torch.allclose(frequencies(model, 5), plain, rtol=1e-12)
    assert torch.allclose(frequencies(model, 16), plain, rtol=1e-12)
    twice = frequencies(model, 32)
    assert twice[0] == plain[0]
    # The lowest frequency is divided by factor * growth - (factor - 1).
    assert twice[-1] == pytest.approx(plain[-1] / 5)
    assert frequencies(model, 64)[-1] < twice[-1]


def test_longrope_frequencies_take_the_long_factors_beyond_the_original_context() -> None:
    model, plain = spec("longrope", **LONG), plain_frequencies(8, 10000.0, torch.float64)
    assert torch.allclose(frequencies(model, 16) * torch.tensor(LONG["short_factors"]), plain)
    assert torch.allclose(frequencies(model, 17) * torch.tensor(LONG["long_factors"]), plain)


def test_attention_factor_scales_cosines_and_sines_of_scaled_layers_alone() -> None:
    model, where = spec("yarn"), torch.arange(40)
    cosine, sine = rotation_of(model, where, torch.float64, scaled=True)
    assert torch.allclose(cosine**2 + sine**2, torch.tensor(model.attention_factor**2, dtype=torch.float64))
    assert model.attention_factor > 1.1
    cosine, sine = rotation_of(model, where, torch.float64, scaled=False)
    assert torch.allclose(cosine**2 + sine**2, torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"nope_layers": (4,)}, "nope_layers"),
        ({"nope_layers": (1, 1)}, "nope_layers"),
        ({"full_attention_layers": (0,)}, "full_attention_layers"),
        ({"sliding_window": 4, "full_attention_layers": (2, 1)}, "full_attention_layers"),
        ({"position": "learned", "nope_layers": (0,)}, "position = rotary"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "short_factors"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, **LONG}}, "short_factors"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factors": (1.0,), "long_factors": (1.0,)}},
            "must have 4 values",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0, "low_frequency_factor": 4.0}}, "low_frequency_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "rotating"),
    ],
)
def test_spec_with_impossible_layers_or_scaling_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ModelSpec(**{**BASE, **fields})


def test_spec_of_other_layers_keeps_what_each_layer_computes() -> None:
    model = ModelSpec(
        **BASE,
        sliding_window=4,
        full_attention_layers=(1, 3),
        nope_layers=(3,),
        rope_scaling=RopeScalingSpec(type="linear", factor=2.0, layers="full_attention"),
    )
    sources = (0, 1, 1, 3, 2)
    made = model.of_layers(sources)
    assert made.layers == 5
    for index, source in enumerate(sources):
        assert (made.window(index), made.rotary(index)) == (model.window(source), model.rotary(source))
    assert [model.rotary(index) for index in range(4)] == ["plain", "scaled", "plain", "none"]
