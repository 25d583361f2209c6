"""Steps, samples and ramps against a plain simulation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.trainer.job.sections import BatchSpec, RampSpec, StageSpec
from keepwarm.trainer.job.stages import global_size_at, mixtures, steps_for


@st.composite
def batches(draw: st.DrawFn) -> BatchSpec:
    start = draw(st.integers(1, 8))
    increment = draw(st.integers(1, 8))
    levels = draw(st.integers(0, 5))
    ramp = RampSpec(start=start, increment=increment, samples=draw(st.integers(1, 500))) if levels else None
    return BatchSpec(global_batch_size=start + levels * increment, ramp=ramp)


@given(batches(), st.integers(0, 600), st.integers(1, 600))
def test_steps_for_equals_counting(batch: BatchSpec, consumed: int, samples: int) -> None:
    steps = given_out = 0
    while given_out < samples:
        given_out += global_size_at(batch, consumed + given_out)
        steps += 1
    assert steps_for(batch, consumed, samples) == (steps, given_out)


@given(batches(), st.integers(0, 2000))
def test_batch_ramp_never_shrinks_and_ends_at_global_batch_size(batch: BatchSpec, consumed: int) -> None:
    assert global_size_at(batch, consumed) <= global_size_at(batch, consumed + 1) <= batch.global_batch_size
    if batch.ramp is not None:
        assert global_size_at(batch, 0) == batch.ramp.start or batch.ramp.samples <= 5
        assert global_size_at(batch, batch.ramp.samples) == batch.global_batch_size
        assert (global_size_at(batch, consumed) - batch.ramp.start) % batch.ramp.increment == 0


def _stage(**values: object) -> StageSpec:
    return StageSpec.model_validate(
        {"name": "s", "tokens": 100, "mixture": {"a": 3.0, "b": 1.0}, "lr": {"max": 1e-3}, **values}
    )


def test_mixture_steps_start_at_their_samples() -> None:
    stage = _stage(mixture_steps=({"at": 0.5, "mixture": {"b": 1.0}}, {"at": 0.9, "mixture": {"c": 1.0}}))
    assert mixtures(stage, 11) == ((0, {"a": 3.0, "b": 1.0}), (5, {"b": 1.0}), (9, {"c": 1.0}))
    assert mixtures(stage, 1) == ((0, {"c": 1.0}),)


@given(st.integers(1, 300), st.integers(1, 20))
def test_mixture_ramp_is_a_staircase_around_the_line(samples: int, stairs: int) -> None:
    ramp = {"to": {"b": 2.0, "c": 2.0}, "start": 0.25, "end": 0.75, "stairs": stairs}
    found = mixtures(_stage(mixture_ramp=ramp), samples)
    begins = [begin for begin, _ in found]
    assert begins == sorted(set(begins))
    assert begins[0] == 0
    assert begins[-1] < samples
    assert found[-1][1] == ramp["to"] or samples < 4
    ends = [*begins[1:], samples]
    for (begin, mixture), end in zip(found, ends, strict=True):
        if begin < int(0.25 * samples) or begin >= int(0.75 * samples):
            continue
        line = [min(1.0, max(0.0, (at / samples - 0.25) / 0.5)) for at in (begin, end + 1)]
        assert sum(mixture.values()) == pytest.approx(1)
        slack = 1 / stairs + 2 / samples
        assert 0.75 * (1 - line[1]) - slack <= mixture["a"] <= 0.75 * (1 - line[0]) + slack
