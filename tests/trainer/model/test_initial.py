"""Initial weights depend on seed, name and index, on nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.initial import normal
from keepwarm.trainer.model.spec import InitSpec, ModelSpec

SHAPES = [(1, 1), (7, 5), (300, 24), (33, 4096), (3, 5000), (2, 8193), (5000, 1)]
"""Narrow, wide, and on both sides of what fits into a tile."""


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_initial_slice_equals_the_whole_there(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True)]
    whole = normal(3, "a.weight", shape, (0, 0), shape)
    box = normal(3, "a.weight", shape, (starts[0], starts[1]), (sizes[0], sizes[1]))
    assert torch.equal(box, whole[starts[0] : starts[0] + sizes[0], starts[1] : starts[1] + sizes[1]])


def test_initial_empty_slice_is_empty() -> None:
    assert normal(3, "a.weight", (7, 5), (7, 0), (0, 5)).shape == (0, 5)


def test_initial_seed_name_and_place_all_matter() -> None:
    shape = (64, 5000)
    one = normal(1, "a.weight", shape, (0, 0), shape)
    assert torch.equal(one, normal(1, "a.weight", shape, (0, 0), shape))
    assert not torch.equal(one, normal(2, "a.weight", shape, (0, 0), shape))
    assert not torch.equal(one, normal(1, "b.weight", shape, (0, 0), shape))
    assert one.unique().numel() > 0.99 * one.numel()


def test_initial_numbers_are_normal() -> None:
    numbers = normal(1, "a.weight", (512, 2048), (0, 0), (512, 2048))
    assert numbers.dtype == torch.float32
    assert abs(numbers.mean()) < 0.005
    assert abs(numbers.std() - 1) < 0.005
    assert abs((numbers.abs() < 1).float().mean() - 0.6827) < 0.003
    rows = torch.corrcoef(numbers[:64])
    assert (rows - torch.eye(64)).abs().max() < 0.15


def test_initial_bits_are_pinned() -> None:
    """A changed stream would silently change every run that starts anew."""
    numbers = normal(1234, "layers.0.attention.query.weight", (8, 6000), (5, 4094), (1, 4))
    assert numbers[0].tolist() == PINNED


PINNED = [-2.0982141494750977, -0.5163228511810303, -1.1163263320922852, -0.8676684498786926]

SPEC = ModelSpec(
    layers=2,
    hidden_size=64,
    heads=4,
    ffn_size=96,
    vocabulary_size=512,
    max_sequence_length=32,
    norm="layer",
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    qk_norm="head",
    position="learned",
    init=InitSpec(std=0.02, output_std=0.005),
)


@pytest.mark.parametrize("tied", [False, True])
def test_initial_every_parameter_starts_as_published(tied: bool) -> None:
    decoder = Decoder(SPEC.model_copy(update={"tied_embeddings": tied}), seed=1)
    part = decoder.build_stage(range(2), embed=True, head=True)
    seen = set()
    for name, parameter in part.named_parameters():
        shape = tuple(parameter.shape)
        values = decoder.initial(name, shape, (0,) * len(shape), shape)
        kind = "bias" if name.endswith("bias") else "norm" if "norm" in name else "matrix"
        seen.add(kind)
        if kind == "bias":
            assert not values.any()
        elif kind == "norm":
            assert (values == 1).all()
        else:
            output = name.endswith(("output.weight", "down.weight"))
            assert values.std() == pytest.approx(0.005 if output else 0.02, rel=0.1)
        assert decoder.decays(name) == (kind == "matrix")
        assert decoder.is_embedding(name) == (name in ("embedding.weight", "positions.weight"))
    assert seen == {"bias", "norm", "matrix"}


def test_initial_tied_head_equals_embedding() -> None:
    decoder = Decoder(SPEC.model_copy(update={"tied_embeddings": True}), seed=1)
    boxes = [decoder.initial(name, (512, 64), (100, 0), (50, 64)) for name in ("embedding.weight", "head.weight")]
    assert torch.equal(*boxes)
    assert decoder.canonical("head.weight") == "embedding.weight"
    assert decoder.is_embedding("head.weight")
    assert Decoder(SPEC, seed=1).canonical("head.weight") == "head.weight"
