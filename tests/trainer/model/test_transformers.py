"""Models of transformers: a stage computes what the class computes, from the same weights, document by document."""

import json
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.transformers.describe import describe
from keepwarm.trainer.model.transformers.parts import TransformersDecoder
from keepwarm.trainer.model.transformers_spec import TransformersSpec
from tests.support.transformers.models import (
    SEED,
    Run,
    bare_class,
    batch_of,
    config_of,
    rate,
    spec_from,
    spec_of,
    tensors_of,
    train,
    whole_stage,
)

FAMILIES = [
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "olmo3", "smollm3", "glm4",
    "apertus", "gptj",
]  # fmt: skip
MECHANISMS = ["minicpm3", "granite_swa"]
"""Latent attention and sinks, of which no family above has any."""
MORE = [
    "apertus1p5_text", "arcee", "codegen", "cohere", "cohere2", "cohere_compass_text", "ernie4_5", "exaone", "exaone4",
    "gemma", "gemma4_unified_text", "glm", "gpt_neox", "helium", "hyperclovax", "internlm3", "iquestcoder", "jais2",
    "ministral", "ministral3", "mistral", "olmo", "phi", "seed_oss", "starcoder2", "vaultgemma", "youtu",
]  # fmt: skip
ALL = [*FAMILIES, *MECHANISMS, *(pytest.param(family, marks=pytest.mark.long) for family in MORE)]


def close(found: torch.Tensor, expected: torch.Tensor, within: float) -> bool:
    return bool((found - expected).abs().max() <= within * expected.abs().max())


def weights_of(part: torch.nn.Module, spec: TransformersSpec) -> dict[str, torch.Tensor]:
    model = TransformersDecoder(spec, SEED)
    return {model.canonical(name): tensor.clone() for name, tensor in tensors_of(part).items()}


@pytest.mark.parametrize("family", ALL)
def test_stage_of_a_family_computes_the_logits_of_its_class(family: str) -> None:
    spec = spec_of(family)
    part = whole_stage(spec)
    tokens, _, documents = batch_of(0)
    bare = bare_class(spec, weights_of(part, spec))
    with torch.no_grad():
        assert close(part(tokens), bare(tokens).logits, 1e-5)
        # Each document gives what it gives alone, and nothing of it depends on another.
        together = part(tokens, documents=documents)[0]
        length = int((documents[0] == documents[0, 0]).sum())
        assert 0 < length < len(together)
        assert close(together[:length], bare(tokens[:1, :length]).logits[0], 1e-5)
        changed = tokens.clone()
        changed[:, :length] = (changed[:, :length] + 1) % spec.vocabulary_size
        assert torch.equal(part(changed, documents=documents)[0, length:], together[length:])


def bare_loop(spec: TransformersSpec, run: Run) -> list[tuple[float, float]]:
    """Loss and gradient norm of the same steps around the bare class."""
    bare = bare_class(spec, weights_of(whole_stage(spec), spec))
    parameters = list(bare.parameters())
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in parameters if one.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for step in range(run.steps):
        tokens, targets, _ = batch_of(step)
        loss = F.cross_entropy(bare(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))
    return steps


@pytest.mark.dist
@pytest.mark.parametrize("family", ALL)
def test_five_steps_of_a_family_equal_a_loop_around_its_class(family: str) -> None:
    run = Run(optimizer="adamw", steps=5)
    found = [(step.loss, step.grad_norm) for step in train(spec_of(family), run).steps]
    for ours, theirs in zip(found, bare_loop(spec_of(family), run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_initial_box_is_a_part_of_the_whole_and_the_padding_row_is_zero() -> None:
    model = TransformersDecoder(spec_from(config_of("qwen3", pad_token_id=5, initializer_range=0.1)), SEED)
    whole = model.initial("embedding.weight", (64, 32), (0, 0), (64, 32))
    assert bool((whole[5] == 0).all())
    assert whole.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(model.initial("embedding.weight", (64, 32), (4, 16), (8, 16)), whole[4:12, 16:])
    assert torch.equal(model.initial("final_norm.weight", (32,), (0,), (32,)), torch.ones(32))


def test_fused_projections_have_the_names_of_their_parts() -> None:
    shapes = spec_of("phi3").shapes(range(4), embed=True, head=True)
    assert shapes["layers.3.attention.query.weight"] == (32, 32)
    assert shapes["layers.3.attention.value.weight"] == (16, 32)
    assert shapes["layers.3.mlp.gate.weight"] == (48, 32)
    assert not [name for name in shapes if "proj" in name]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"model_type": "mixtral"}, "mixture of experts; these come later"),
    "no-plans": ({"model_type": "gpt2"}, "no tensor-parallel and pipeline plan"),
    "other-stages": ({"model_type": "hrm_text"}, "other parts than an embedding, layers and a norm"),
    "unknown": ({"model_type": "nonesuch"}, "unknown to the transformers that is installed"),
    "encoder-decoder": ({"model_type": "t5"}, "no causal language model"),
    "broken": ({"model_type": "llama", "hidden_size": -1}, "does not build|refuses this config"),
    "contradicting": ({"model_type": "llama", "hidden_act": "nonesuch"}, "does not build|refuses this config"),
    "both-ways": ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "masks that are not causal"),
    "own-parameters": ({"model_type": "doge"}, r"parameters of its own \(input_residual, .*, A\)"),
    "embedding-by-layer": (config_of("gemma3n_text"), "outside its layers"),
    "other-senses": ({"model_type": "phi4_multimodal"}, "outside its layers"),
    "linear-attention": ({"model_type": "qwen3_5_text"}, "only with kernels for GPUs"),
    "hybrid": ({"model_type": "olmo_hybrid"}, "only with kernels for GPUs"),
    "latent-groups": ({"model_type": "minicpm3"}, "latent attention has as many as heads, which are 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_that_cannot_be_trained_is_refused_in_one_sentence(case: str) -> None:
    changes, reason = REFUSED[case]
    with pytest.raises(SpecError, match=reason) as refused:
        describe({**config_of("llama"), "rope_parameters": None, **changes})
    assert "\n" not in str(refused.value)
    if "broken" not in case and "contradicting" not in case:  # where transformers says itself what is wrong
        assert "Error" not in str(refused.value)


def test_description_survives_its_storage() -> None:
    spec = spec_of("gemma3_text")
    assert TransformersSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.description.windows == (5, None, 5, None)
    assert json.loads(spec.model_dump_json())["config"] == config_of("gemma3_text")
