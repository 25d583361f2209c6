"""Buffers of transformers' layers: described, given their numbers, kept as they are, and refused where they change."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import activations

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.transformers.describe import describe
from keepwarm.trainer.model.transformers.parts import TransformersDecoder
from tests.support.transformers.models import SEED, batch_of, config_of, spec_from, spec_of, tensors_of, whole_stage


def test_numbers_that_a_class_gives_its_tensors_are_their_initial_values() -> None:
    part, fresh = tensors_of(whole_stage(spec_of("apertus"))), activations.XIELUActivation(dtype=torch.float32)
    for name, tensor in (*fresh.named_parameters(), *fresh.named_buffers()):
        assert torch.equal(part[f"layers.2.mlp.act_fn.{name}"], tensor), name
    model = TransformersDecoder(spec_of("gemma4_unified_text"), SEED)
    assert torch.equal(model.initial("layers.3.layer_scalar", (1,), (0,), (1,)), torch.ones(1))


def test_published_dtype_of_a_config_changes_no_initial_value() -> None:
    part = tensors_of(whole_stage(spec_from(config_of("apertus", dtype="bfloat16"))))
    assert {tensor.dtype for tensor in part.values()} == {torch.float32}
    assert part["layers.0.mlp.act_fn.eps"].item() == pytest.approx(-1e-6, rel=1e-6)


def test_buffers_are_described_apart_from_the_parameters() -> None:
    spec = spec_of("apertus")
    assert spec.buffers(range(1, 2)) == {"layers.1.mlp.act_fn.beta": (), "layers.1.mlp.act_fn.eps": ()}
    assert not any("beta" in name for name in spec.shapes(range(4), embed=True, head=True))
    assert spec_of("gemma4_unified_text").buffers(range(3, 4)) == {"layers.3.layer_scalar": (1,)}
    assert spec_of("llama").buffers(range(4)) == {}


def test_hidden_states_keep_their_dtype_beside_buffers_of_another() -> None:
    part = whole_stage(spec_of("gemma4_unified_text"))
    for parameter in part.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    layer: Any = part.layers["0"]  # type: ignore[index]
    layer.layer_scalar.fill_(1.0035)  # 1 in bf16
    kept = layer.layer_scalar
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda _module, _given, hidden: seen.append(hidden.dtype))
    with torch.no_grad():
        logits = part(batch_of(0)[0])
        assert layer.layer_scalar is kept
        kept.fill_(1.0)
        assert torch.equal(part(batch_of(0)[0]), logits)
    assert seen == [torch.bfloat16] * 2
    assert kept.dtype == torch.float32


class Counting(nn.Module):
    """An activation that counts its calls."""

    calls: torch.Tensor

    def __init__(self, dtype: Any = None) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0.0, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


class Replacing(Counting):
    """The same with a new tensor each time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return x


class Whole(Counting):
    """An activation with a buffer of another type."""

    def __init__(self, dtype: Any = None) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


class Unsaved(Counting):
    """An activation with a buffer that is not in checkpoints."""

    def __init__(self, dtype: Any = None) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0.0), persistent=False)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (Counting, "changes its buffer layers.0.mlp.act_fn.calls in training"),
        (Replacing, "changes its buffer layers.0.mlp.act_fn.calls in training"),
        (Whole, r"has a buffer layers\.0\.mlp\.act_fn\.calls of type torch.int64"),
        (Unsaved, "is not saved with its weights"),
    ],
)
def test_buffer_that_cannot_be_kept_is_refused_by_name(
    activation: type[nn.Module], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(activations.ACT2CLS, "xielu", activation)
    with pytest.raises(SpecError, match=reason) as refused:
        describe(config_of("apertus"))
    assert "\n" not in str(refused.value)
