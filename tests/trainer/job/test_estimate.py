"""The planner's numbers against modules that are really built, and against published ones."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keepwarm.parallel.mesh.layout import split_layers
from keepwarm.trainer.job.estimate import (
    estimate_rank,
    in_flight,
    layer_elements,
    model_flops_per_token,
    stage_shapes,
    total_parameters,
)
from keepwarm.trainer.job.files import load_model, shipped_configs
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.models import whole_model

MODELS = sorted((shipped_configs() / "models").glob("*.yaml"))

PUBLISHED = {
    "pythia-70m": 70_426_624,
    "pythia-410m": 405_334_016,
    "pythia-6.9b": 6_857_302_016,
    "neox-10b": 9_642_249_216,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "olmo-2-7b": 7_298_617_344,
    "qwen3-8b": 8_190_735_360,
}


def job(model: ModelSpec | str, sequence: int = 64, batch: int = 8, **sections: Any) -> JobSpec:
    """A job on `model` (a shipped one by name); `sections` replace others."""
    spec = load_model(shipped_configs() / "models" / f"{model}.yaml") if isinstance(model, str) else model
    return JobSpec.model_validate(
        {
            "name": "test",
            "output": "out",
            "model": spec,
            "data": {"sources": {"a": "a"}, "sequence_length": sequence},
            "batch": {"global_batch_size": batch},
            "stages": ({"name": "one", "tokens": 1 << 20, "mixture": {"a": 1.0}, "lr": {"max": 1e-3}},),
            **sections,
        }
    )


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_estimate_shipped_models_equal_built_parameter_counts(path: Path) -> None:
    spec = load_model(path)
    with torch.device("meta"):
        whole = Decoder(spec, 1).build_stage(range(spec.layers), embed=True, head=True)
    assert total_parameters(spec) == numel(whole)
    if path.stem in PUBLISHED:
        assert total_parameters(spec) == PUBLISHED[path.stem]


def test_estimate_shipped_models_have_their_stated_size() -> None:
    assert {"tiny", "demo", "mt-nlg-530b", *PUBLISHED} == {path.stem for path in MODELS}
    sizes = {path.stem: total_parameters(load_model(path)) for path in MODELS}
    assert 90_000 <= sizes["tiny"] <= 110_000
    assert 1_000_000 <= sizes["demo"] <= 2_000_000
    assert sizes["mt-nlg-530b"] == pytest.approx(530e9, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["demo", "pythia-70m", "olmo-2-7b", "mt-nlg-530b"])
def test_estimate_stages_equal_built_parameter_counts(name: str, tied: bool) -> None:
    spec = load_model(shipped_configs() / "models" / f"{name}.yaml").model_copy(update={"tied_embeddings": tied})
    stages = 35 if name == "mt-nlg-530b" else 2
    one = job(spec, batch=64, parallel={"pipeline": stages})
    for stage, layers in enumerate(split_layers(spec.layers, one.parallel)):
        if 1 < stage < stages - 2:
            continue
        with torch.device("meta"):
            part = Decoder(spec, 1).build_stage(layers, embed=stage == 0, head=stage == stages - 1)
        built = {name: tuple(parameter.shape) for name, parameter in part.named_parameters()}
        assert stage_shapes(one, stage) == built
        assert estimate_rank(one, stage).parameters == numel(part)


def test_estimate_tensor_and_data_axes_split_parameters() -> None:
    """Llama 3 8B on tensor 4: matrices split, norms whole; FSDP over 3 leaves the first rank the larger part."""
    whole = job("llama-3-8b", parallel={"tensor": 4})
    norms = (2 * 32 + 1) * 4096
    assert estimate_rank(whole, 0).parameters == (8_030_261_248 - norms) // 4 + norms
    split = job("llama-3-8b", batch=9, parallel={"tensor": 4, "data": 3})
    ceil = -(-4096 // 3)
    expected = sum(
        -(-(rows // (4 if rows != 4096 or bare else 1)) // 3) * columns for rows, columns, bare in _llama_rows()
    )
    assert estimate_rank(split, 0).parameters == expected + (2 * 32 + 1) * ceil


def _llama_rows() -> list[tuple[int, int, bool]]:
    """Rows and local columns of every matrix of Llama 3 8B on tensor 4, and whether the rows are split."""
    layer = [
        (4096, 4096, True),
        (1024, 4096, True),
        (1024, 4096, True),
        (4096, 1024, False),
        (14336, 4096, True),
        (14336, 4096, True),
        (4096, 3584, False),
    ]
    return [(128256, 4096, True)] * 2 + layer * 32


def test_estimate_llama_8b_replicated_fp32_is_16_bytes_a_parameter() -> None:
    """No axis at all: weights, gradients and two moments of 4 bytes each; the head's gradient before it is added."""
    plain = estimate_rank(job("llama-3-8b"), 0)
    assert plain.weights == plain.optimizer // 2 == 4 * 8_030_261_248
    assert plain.gradients == 4 * (8_030_261_248 + 128_256 * 4096)
    assert estimate_rank(job("llama-3-8b", batch=1), 0).gradients == 4 * 8_030_261_248
    assert plain.parameters == 8_030_261_248
    assert plain.total == plain.weights + plain.gradients + plain.optimizer + plain.activations


def test_estimate_memory_follows_data_mode() -> None:
    def of(mode: str, **more: Any) -> Any:
        return estimate_rank(job("llama-3-8b", batch=8, parallel={"data": 8, "data_mode": mode, **more}), 0)

    fsdp, kept, hsdp, replicate = (
        of("fsdp"),
        of("fsdp", reshard_after_forward=False),
        of("hsdp", shard_size=2),
        of("ddp"),
    )
    assert fsdp.optimizer < hsdp.optimizer < replicate.optimizer == 8 * 8_030_261_248
    assert fsdp.optimizer == pytest.approx(replicate.optimizer / 8, rel=1e-4)
    assert fsdp.weights < kept.weights
    assert kept.weights == pytest.approx(4 * 8_030_261_248 * (1 + 1 / 8), rel=1e-4)
    accumulate = {"data": 8, "accumulate": "whole"}
    accumulating = estimate_rank(job("llama-3-8b", batch=16, parallel=accumulate), 0)
    assert fsdp.gradients < 4 * 8_030_261_248 < accumulating.gradients


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "neox", "gpt"])
def test_estimate_activations_equal_saved_tensors(name: str, recompute: str) -> None:
    """Against the bytes of all tensors that autograd saves in a forward, parameters aside."""
    from keepwarm.parallel.recompute import apply_numerics
    from keepwarm.parallel.spec import NumericsSpec

    spec = FAMILIES[name]
    model = whole_model(spec)
    numerics = {"recompute": recompute}
    apply_numerics(model, NumericsSpec(**numerics))  # type: ignore[arg-type]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, spec.vocabulary_size, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(tokens, None, tokens)
        held = sum(kept.values())
        del loss
    tokens_kept, _ = layer_elements(job(spec, sequence=128, batch=4, numerics=numerics))
    elements = spec.layers * tokens_kept + 2 * spec.hidden_size + spec.vocabulary_size
    assert held == pytest.approx(4 * tokens.numel() * (elements + unfused(spec, recompute)), rel=0.03)


def unfused(spec: ModelSpec, recompute: str) -> int:
    """Elements per token that RMSNorm keeps on the CPU beyond its input: the normalised input, too."""
    if spec.norm != "rms":
        return 0
    layer = {"none": 2 * spec.hidden_size, "selective": 2 * spec.hidden_size, "full": 0}[recompute]
    if spec.qk_norm != "none" and recompute == "none":
        layer += (spec.heads + spec.key_value_heads) * spec.size_per_head
    return spec.hidden_size + spec.layers * layer


BASE: dict[str, Any] = {
    "layers": 6,
    "hidden_size": 128,
    "heads": 4,
    "ffn_size": 352,
    "vocabulary_size": 256,
    "max_sequence_length": 128,
}
GPT: dict[str, Any] = {
    "norm": "layer",
    "activation": "gelu",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
FAMILIES = {
    "llama": ModelSpec(**BASE, kv_heads=2),
    "qwen3": ModelSpec(**BASE, qk_norm="head"),
    "olmo2": ModelSpec(**BASE, qk_norm="projection", norm_position="post"),
    "neox": ModelSpec(**BASE, **GPT, parallel_residual=True, rotary_fraction=0.25),
    "gpt": ModelSpec(**BASE, **GPT, position="learned", tied_embeddings=True),
}


def test_estimate_sequence_and_tensor_parallel_shrink_activations() -> None:
    def of(**parallel: Any) -> int:
        return estimate_rank(job("llama-3-8b", sequence=8192, parallel=parallel), 0).activations

    assert of() > of(tensor=8) > of(tensor=8, sequence=True)


def test_estimate_in_flight_micro_batches_follow_schedule() -> None:
    """1F1B holds as many as stages follow; the interleaved schedule its longer warm-up; neither more than there are."""
    plain = job("llama-3-8b", batch=64, parallel={"pipeline": 4}).parallel
    assert [in_flight(plain, at, 64) for at in range(4)] == [4, 3, 2, 1]
    assert in_flight(plain, 0, 2) == 2
    looped = job("llama-3-8b", batch=64, parallel={"pipeline": 4, "schedule": "interleaved"}).parallel
    assert [in_flight(looped, at, 64) for at in range(4)] == [11, 9, 7, 5]
    long = job("llama-3-8b", sequence=8192, batch=64, parallel={"pipeline": 4})
    memory = [estimate_rank(long, at).activations for at in range(3)]
    assert all(first > second for first, second in pairwise(memory))


def test_estimate_model_flops_match_published_mfu() -> None:
    """10,471 tokens/s of Llama 3 8B at sequence 8,192 on one H200 are given as 57.8 % MFU."""
    spec = load_model(shipped_configs() / "models" / "llama-3-8b.yaml")
    assert 10_471 * model_flops_per_token(spec, 8192) / 989e12 == pytest.approx(0.578, abs=0.001)


def test_estimate_windows_count_the_tokens_that_layers_see() -> None:
    """By summation over all queries; without a window the published formula."""
    plain = load_model(shipped_configs() / "models" / "llama-3-8b.yaml")
    mixed = plain.model_copy(update={"layers": 3, "sliding_window": 6, "full_attention_layers": (1,)})
    window, sequence, width = 6, 64, plain.heads * plain.size_per_head
    attention = model_flops_per_token(mixed, sequence) - 6.0 * total_parameters(mixed)
    exact = sum((at + 0.5) - max(0.0, at + 0.5 - window) for at in range(sequence)) / sequence
    assert attention == pytest.approx(12 * width * (sequence / 2 + 2 * exact), rel=1e-3)


def test_estimate_imports_no_torch() -> None:
    code = "import sys, keepwarm.trainer.job.estimate, keepwarm.trainer.model.huggingface_config; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_estimate_zero_stages_match_paper() -> None:
    """Bytes per parameter of the ZeRO paper's stages (Rajbhandari et al., 2020), AdamW, eight data-parallel ranks."""

    def of(**parallel: Any) -> tuple[float, float, float]:
        numerics = {"precision": "bf16" if parallel["engine"] == "megatron" else "fp32"}
        rank = estimate_rank(job("llama-3-8b", parallel={"data": 8, **parallel}, numerics=numerics), 0)
        whole = total_parameters(load_model(shipped_configs() / "models" / "llama-3-8b.yaml"))
        return rank.weights / whole, rank.gradients / whole, rank.optimizer / whole

    assert of(engine="megatron") == pytest.approx((2 + 4 / 8, 4, 8 / 8), rel=1e-6)
    assert of(engine="megatron", data_mode="ddp") == pytest.approx((2 + 4, 4, 8), rel=1e-6)
    assert of(engine="deepspeed") == pytest.approx((4 + 4 / 8, 4, 8 / 8), rel=1e-6)
    assert of(engine="deepspeed", options={"zero_stage": 2}) == pytest.approx((4 + 4 / 8, 4 / 8, 8 / 8), rel=1e-6)
    offloaded = {"zero_stage": 3, "offload_optimizer": True}
    assert of(engine="deepspeed", options=offloaded) == pytest.approx((4 / 8, 4 / 8, 0), rel=1e-6)
