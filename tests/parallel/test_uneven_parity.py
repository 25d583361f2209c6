"""A vocabulary that the tensor axis does not divide, and fewer key-value heads than its ranks: as on one rank."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from keepwarm.parallel.style import copies_of, misfits, unequal
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.parity import Outcome, differing
from tests.support.ranks import ROOT
from tests.support.transformers.models import Run, config_of, spec_from, train

ALONE = Run(precision="fp64", documents=True)
UNEVEN = 67
NATIVE = ModelSpec(
    layers=2,
    hidden_size=32,
    heads=4,
    kv_heads=2,
    ffn_size=48,
    vocabulary_size=UNEVEN,
    max_sequence_length=64,
)
FIELDS: dict[str, dict[str, Any]] = {
    "native": {},
    "one-head": {"kv_heads": 1, "tied_embeddings": True, "z_loss": 0.01, "qkv_bias": True},
    "norm-of-heads": {"qk_norm": "head"},
    "norm-of-projections": {"qk_norm": "projection", "norm_position": "post"},
}
CLASSES = {"phi3": {"vocab_size": UNEVEN}, "gemma2": {"vocab_size": UNEVEN}, "olmo2": {"vocab_size": UNEVEN}}
LAYOUTS = [
    Run(tensor=4, sequence=True),
    Run(tensor=2, data=2, sequence=True),
    Run(tensor=4, pipeline=2),
    Run(tensor=4, data=2, recompute="selective"),
]


@cache
def spec_named(name: str) -> AnyModelSpec:
    if name in FIELDS:
        return ModelSpec.model_validate(NATIVE.model_dump() | FIELDS[name])
    return spec_from(config_of(name, **CLASSES[name]))


@cache
def alone(name: str) -> Outcome:
    return train(spec_named(name), ALONE)


def check(expected: Outcome, found: Outcome, within: float) -> None:
    for one, other in zip(expected.steps, found.steps, strict=True):
        assert (other.loss, other.grad_norm) == pytest.approx((one.loss, one.grad_norm), rel=within)
    assert expected.state.keys() == found.state.keys()
    for name, value in expected.state.items():
        assert value.shape == found.state[name].shape, name
        # The gradient of a key's bias is nothing but rounding.
        if value.is_floating_point() and not name.endswith("attention.key.bias"):
            assert torch.linalg.vector_norm(found.state[name] - value) <= within * torch.linalg.vector_norm(value), name


def rounding(name: str) -> float:
    """What norms of transformers' classes leave, which compute in fp32."""
    return 1e-9 if name in FIELDS else 1e-6


CASES = [
    pytest.param(name, layout, marks=[] if at == 0 or name == "native" else pytest.mark.long)
    for name in [*FIELDS, *CLASSES]
    for at, layout in enumerate(LAYOUTS)
]


@pytest.mark.dist
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_uneven_model_equals_one_rank_and_keeps_no_padding(name: str, layout: Run) -> None:
    run = replace(layout, precision="fp64", documents=True)
    check(alone(name), train(spec_named(name), run), rounding(name))


@pytest.mark.dist
@pytest.mark.parametrize("name", ["native", "phi3"])
def test_state_of_an_uneven_layout_goes_on_in_others(name: str) -> None:
    spec, run = spec_named(name), replace(ALONE, optimizer="adamw", steps=4)
    wide = replace(run, tensor=4, sequence=True)
    half = train(spec, replace(wide, steps=2))
    whole = train(spec, wide)
    again = train(spec, wide, start=half.state, first=2)
    assert again.steps == whole.steps[2:]
    assert differing(again.state, whole.state) == []
    for other in (run, replace(run, tensor=2, pipeline=2)):
        for one, two in zip(whole.steps[2:], train(spec, other, start=half.state, first=2).steps, strict=True):
            assert (two.loss, two.grad_norm) == pytest.approx((one.loss, one.grad_norm), rel=rounding(name))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "vocabulary", "tensor", "problem"),
    [
        (4, 4, 64, 4, None),
        (8, 2, 67, 4, None),
        (4, 4, 64, 3, "model.heads = 4 does not divide by parallel.tensor = 3"),
        (12, 3, 64, 4, "model.kv_heads = 3 neither divides by parallel.tensor = 4 nor divides it"),
        (4, 4, 5, 4, "model.vocabulary_size = 5 leaves a rank of parallel.tensor = 4 without a token"),
    ],
)
def test_number_that_stands_in_the_way_of_a_layout_is_named(
    heads: int, kv_heads: int, vocabulary: int, tensor: int, problem: str | None
) -> None:
    assert list(misfits(heads, kv_heads, vocabulary, tensor)) == ([] if problem is None else [problem])


def test_ranks_copy_key_value_heads_alone_and_only_where_there_are_fewer() -> None:
    assert (copies_of("key_value", 2, 8), copies_of("key_value_norm", 1, 4)) == (4, 4)
    assert (copies_of("key_value", 8, 2), copies_of("column", 1, 4), copies_of(None, 1, 4)) == (1, 1, 1)


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_engine_with_equal_parts_refuses_what_does_not_divide(engine: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_job(
            ROOT / "configs/ci/tiny.yaml",
            [f"parallel.engine={engine}", "parallel.tensor=4", "model.kv_heads=2", "model.vocabulary_size=513"],
        )
    for line in unequal(2, 513, 4):
        assert f"parallel.engine = {engine}: {line}" in str(refused.value)
