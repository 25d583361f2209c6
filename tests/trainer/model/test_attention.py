"""Which token sees which: documents, windows, positions that restart."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from keepwarm.trainer.model import attention
from keepwarm.trainer.model.attention import Context, Logits, attend, context
from keepwarm.trainer.model.rotary import positions_in
from keepwarm.trainer.model.spec import ModelSpec, RopeScalingSpec
from tests.support.models import whole_model

BASE: dict[str, Any] = {
    "layers": 2,
    "hidden_size": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn_size": 48,
    "vocabulary_size": 64,
    "max_sequence_length": 64,
}
FAMILIES = {
    "rotary": ModelSpec(**BASE),
    "partial": ModelSpec(**BASE, rotary_fraction=0.5),
    "learned": ModelSpec(**BASE, position="learned", norm="layer", activation="gelu"),
    "window": ModelSpec(**BASE, sliding_window=5),
    "patterned": ModelSpec(
        **{**BASE, "layers": 3},
        sliding_window=5,
        full_attention_layers=(1,),
        nope_layers=(0,),
        rope_scaling=RopeScalingSpec(type="llama3", factor=8.0, original_max_sequence_length=16),
    ),
}
LENGTHS = ((9, 23, 1, 7), (40,))


def documents_of(lengths: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """int32 `[samples, sequence]` for the documents of each sample; indices are neither ordered nor dense."""
    rows = [[7 * index % 5 + 10 * index for index, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_packed_documents_equal_separate_forwards(family: str) -> None:
    """Logits and gradients, in fp64, of packed documents and of each document alone."""
    model = whole_model(FAMILIES[family], dtype=torch.float64)
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    slope = torch.randn(2, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(packed: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        if packed:
            logits = model(tokens, documents_of(LENGTHS))
        else:
            rows = [
                torch.cat([model(document[None]) for document in row.split(lengths)], dim=1)
                for row, lengths in zip(tokens, LENGTHS, strict=True)
            ]
            logits = torch.cat(rows)
        logits.backward(slope)
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (packed, packed_slopes), (alone, alone_slopes) = gradients(True), gradients(False)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(packed, model(tokens), atol=1e-3)
    for one, other in zip(packed_slopes, alone_slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_attention_packed_documents_in_fp32_equal_separate_forwards() -> None:
    model = whole_model(FAMILIES["rotary"])
    tokens = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    documents = documents_of(((9, 23, 8),))
    with torch.no_grad():
        alone = torch.cat([model(part) for part in tokens.split((9, 23, 8), dim=1)], dim=1)
        assert (model(tokens, documents) - alone).abs().max() <= 1e-6


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention from its definition, one head and one query at a time."""
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    groups = query.shape[2] // key.shape[2]
    for sample, at, head in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        seen = [
            other
            for other in range(at + 1)
            if (window is None or at - other < window)
            and (documents is None or documents[sample, other] == documents[sample, at])
        ]
        scores = key[sample, seen, head // groups] @ query[sample, at, head] / query.shape[3] ** 0.5
        if sinks is not None:
            scores = torch.cat([scores, sinks[head, None]])
        out[sample, at, head] = scores.softmax(0)[: len(seen)] @ value[sample, seen, head // groups]
    return out


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("flex", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_follows_its_definition(
    window: int | None, packed: bool, kv_heads: int, flex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paths of the CPU, and the block mask that CUDA takes, evaluated by FlexAttention without a compiler."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, 12, heads, 16, generator=generator) for heads in (4, kv_heads, kv_heads))
    documents = documents_of(((5, 1, 6), (12,))) if packed else None
    if flex:
        seen = Context(blocks=attention._blocks(12, query.device, documents, window))
    else:
        seen = context(None, 12, query.device, documents, window)
    torch.testing.assert_close(
        attend(query, key, value, seen), naive(query, key, value, documents, window), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("flex", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_with_sinks_and_narrow_values_follows_its_definition(
    window: int | None, packed: bool, flex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sink takes its share and gives nothing; values are narrower than queries and keys.

    Gradients included, but of FlexAttention, which has none on a CPU.
    """
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    generator = torch.Generator().manual_seed(4)
    given = [torch.randn(1, 12, heads, size, generator=generator) for heads, size in ((4, 16), (2, 16), (2, 10))]
    given.append(torch.randn(4, generator=generator))
    documents = documents_of(((5, 1, 6),)) if packed else None
    if flex:
        seen = Context(blocks=attention._blocks(12, given[0].device, documents, window))
    else:
        seen = context(None, 12, given[0].device, documents, window)
    slope = torch.randn(1, 12, 4, 10, generator=generator)

    def results(definition: bool) -> tuple[torch.Tensor, ...]:
        query, key, value, sinks = leaves = [one.clone().requires_grad_(not flex) for one in given]
        if definition:
            out = naive(query, key, value, documents, window, sinks)
        else:
            out = attend(query, key, value, seen, Logits(sinks=sinks))
        return (out,) if flex else (out.detach(), *torch.autograd.grad(out, leaves, slope))

    for found, expected in zip(results(False), results(True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda row: sum(row) <= 20), min_size=1))
@settings(max_examples=50, deadline=None)
def test_positions_restart_with_every_document(rows: list[list[int]]) -> None:
    lengths = tuple((*row, 21 - sum(row)) for row in rows)
    expected = [[at for length in row for at in range(length)] for row in lengths]
    assert positions_in(documents_of(lengths)).tolist() == expected
    runs = context(None, 21, torch.device("cpu"), documents_of(lengths), None).runs
    assert runs == tuple(length for row in lengths for length in row)


def test_attention_plain_causal_needs_no_mask() -> None:
    seen = context(None, 64, torch.device("cpu"), None, 64)
    assert seen.mask is seen.runs is seen.blocks is None
    query = torch.randn(1, 8, 2, 4)
    expected = F.scaled_dot_product_attention(*[query.transpose(1, 2)] * 3, is_causal=True)
    assert torch.equal(attend(query, query, query, seen), expected.transpose(1, 2))


def test_rotary_in_bf16_stays_fp32() -> None:
    """Cosines in bf16 would shift positions beyond 256 by whole tokens."""
    model = whole_model(FAMILIES["rotary"], dtype=torch.bfloat16)
    cosine, sine = model._rotation_of("plain", 64, None, torch.zeros(1, dtype=torch.bfloat16)) or (None, None)
    assert cosine is not None
    assert sine is not None
    assert cosine.dtype == sine.dtype == torch.float32
    assert model(torch.zeros(1, 64, dtype=torch.int64)).dtype == torch.bfloat16
