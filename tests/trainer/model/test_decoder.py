"""Parts of the model make the whole, on any device state and type, compiled or not."""

import fnmatch
from typing import Any

import pytest
import torch

from keepwarm.trainer.model.attention import Attention
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.spec import ModelSpec, RopeScalingSpec
from tests.support.models import initialise, losses_of, whole_model

BASE: dict[str, Any] = {
    "layers": 4,
    "hidden_size": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn_size": 48,
    "vocabulary_size": 64,
    "max_sequence_length": 32,
}
GPT: dict[str, Any] = {
    "norm": "layer",
    "activation": "gelu",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
FAMILIES = {
    "llama": ModelSpec(**BASE),
    "llama-tied": ModelSpec(**BASE, tied_embeddings=True),
    "qwen3": ModelSpec(**BASE, qk_norm="head", head_dim=16, z_loss=1e-3),
    "olmo2": ModelSpec(**BASE, qk_norm="projection", norm_position="post"),
    "neox": ModelSpec(**BASE, **GPT, parallel_residual=True, rotary_fraction=0.25),
    "olmo3": ModelSpec(
        **BASE,
        qk_norm="projection",
        norm_position="post",
        sliding_window=5,
        full_attention_layers=(1,),
        rope_scaling=RopeScalingSpec(type="yarn", factor=8.0, original_max_sequence_length=16, layers="full_attention"),
    ),
    "smollm3": ModelSpec(**BASE, nope_layers=(1,), tied_embeddings=True),
    "gpt-tied": ModelSpec(**BASE, **GPT, position="learned", tied_embeddings=True),
}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, documents and targets `[3, 32]`."""
    generator = torch.Generator().manual_seed(6)
    tokens, targets = (torch.randint(0, 64, (3, 32), generator=generator) for _ in range(2))
    targets[1, :9] = -100
    documents = (torch.arange(32) // 13)[None].expand(3, 32).to(torch.int32)
    return tokens, documents, targets


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_stages_compose_to_the_whole(family: str, packed: bool) -> None:
    """Three stages, split unevenly, give bitwise the loss and gradients of one."""
    spec = FAMILIES[family]
    decoder = Decoder(spec, seed=1)
    tokens, documents, targets = batch()
    seen = documents if packed else None
    whole = whole_model(spec)
    expected = losses_of(whole, tokens, seen, targets)
    expected.sum().backward()
    parts = []
    for layers in (range(0, 1), range(1, 3), range(3, 4)):
        part = decoder.build_stage(layers, embed=layers.start == 0, head=layers.stop == 4)
        initialise(part, decoder)
        parts.append(part)
    x: torch.Tensor = tokens
    for part in parts[:-1]:
        x = part(x, seen, targets)
    x = losses_of(parts[-1], x, seen, targets)
    assert torch.equal(x, expected)
    x.sum().backward()
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None
            name = decoder.canonical(name)
            found[name] = found[name] + parameter.grad if name in found else parameter.grad
    assert found.keys() == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_stage_from_meta_device_is_the_same(family: str) -> None:
    """Nothing but parameters has to be filled in after `to_empty`."""
    spec = FAMILIES[family]
    decoder = Decoder(spec, seed=1)
    with torch.device("meta"):
        part = decoder.build_stage(range(4), embed=True, head=True)
    part.to_empty(device="cpu")
    part.tie()
    assert not list(part.buffers())
    initialise(part, decoder)
    tokens, documents, targets = batch()
    assert torch.equal(
        losses_of(part, tokens, documents, targets), losses_of(whole_model(spec), tokens, documents, targets)
    )


@pytest.mark.parametrize("family", ["llama-tied", "gpt-tied"])
def test_decoder_tied_embeddings_are_one_parameter(family: str) -> None:
    model = whole_model(FAMILIES[family])
    assert model.head is not None
    assert model.embedding is not None
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_tensor_plan_names_every_matrix(family: str) -> None:
    decoder = Decoder(FAMILIES[family], seed=1)
    part = decoder.build_stage(range(4), embed=True, head=True)
    plan = decoder.tensor_plan()
    modules = {name for name, module in part.named_modules() if list(module.parameters(recurse=False))}
    named = {name for name in modules if any(fnmatch.fnmatchcase(name, pattern) for pattern in plan)}
    assert named == modules
    assert all(fnmatch.filter(modules, pattern) for pattern in plan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_other_dtypes_stay_close_to_fp32(family: str, dtype: torch.dtype) -> None:
    tokens, documents, targets = batch()
    expected = losses_of(whole_model(FAMILIES[family]), tokens, documents, targets)
    model = whole_model(FAMILIES[family], dtype=dtype)
    loss = losses_of(model, tokens, documents, targets)
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6 if dtype == torch.float64 else 2e-2, atol=1e-6)


def test_attention_half_of_the_heads_gives_half_of_the_sum() -> None:
    """Half of the heads, with the halves of the matrices that belong to them, give half of the sum."""
    spec = FAMILIES["qwen3"]
    model = whole_model(spec)
    layer: Any = model.layers["0"]
    attention: Attention = layer.attention
    from keepwarm.trainer.model.attention import context

    x = torch.randn(2, 8, 32)
    seen = context(model._rotation_of("plain", 8, None, x), 8, x.device, None, None)
    expected = attention(x, seen)
    halves = []
    with torch.no_grad():
        for half in range(2):
            part = Attention(spec)
            part.query_norm, part.key_norm = attention.query_norm, attention.key_norm
            for name, dim in (("query", 0), ("key", 0), ("value", 0), ("output", 1)):
                weight = getattr(attention, name).weight.chunk(2, dim)[half]
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.copy_(weight)
                setattr(part, name, linear)
            halves.append(part(x, seen))
        torch.testing.assert_close(halves[0] + halves[1], expected)


def test_decoder_inference_first_does_not_break_training() -> None:
    model = whole_model(FAMILIES["llama"])
    tokens, documents, targets = batch()
    with torch.inference_mode():
        first = losses_of(model, tokens, documents, targets)
    second = losses_of(model, tokens, documents, targets)
    second.sum().backward()
    assert torch.equal(first.clone(), second)


# What dynamo itself does while it looks at the input of a layer.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("packed", [False, True])
def test_decoder_compiled_layers_agree(packed: bool) -> None:
    tokens, documents, targets = batch()
    plain, compiled = (whole_model(FAMILIES["qwen3"]) for _ in range(2))
    for layer in compiled.layers.values():
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    losses = [losses_of(model, tokens, documents if packed else None, targets) for model in (plain, compiled)]
    for loss in losses:
        (loss * torch.tensor([1.0, FAMILIES["qwen3"].z_loss])).sum().backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)
