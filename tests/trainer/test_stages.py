"""Steps, samples and ramps against a plain simulation."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.spec import BatchSpec, RampSpec
from trainer.stages import global_size_at, steps_for


@st.composite
def batches(draw: st.DrawFn) -> BatchSpec:
    start = draw(st.integers(1, 8))
    increment = draw(st.integers(1, 8))
    levels = draw(st.integers(0, 5))
    ramp = RampSpec(start=start, increment=increment, samples=draw(st.integers(1, 500))) if levels else None
    return BatchSpec(global_size=start + levels * increment, ramp=ramp)


@given(batches(), st.integers(0, 600), st.integers(1, 600))
def test_steps_for_equals_counting_them(batch: BatchSpec, consumed: int, samples: int) -> None:
    steps = given_out = 0
    while given_out < samples:
        given_out += global_size_at(batch, consumed + given_out)
        steps += 1
    assert steps_for(batch, consumed, samples) == (steps, given_out)


@given(batches(), st.integers(0, 2000))
def test_the_ramp_never_shrinks_and_ends_at_the_global_size(batch: BatchSpec, consumed: int) -> None:
    assert global_size_at(batch, consumed) <= global_size_at(batch, consumed + 1) <= batch.global_size
    if batch.ramp is not None:
        assert global_size_at(batch, 0) == batch.ramp.start or batch.ramp.samples <= 5
        assert global_size_at(batch, batch.ramp.samples) == batch.global_size
        assert (global_size_at(batch, consumed) - batch.ramp.start) % batch.ramp.increment == 0
