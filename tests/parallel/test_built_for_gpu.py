"""What engines build and call for a GPU, seen without one: by fake tensors and the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.testing._internal.distributed.fake_pg import FakeStore

from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.trainer.model import attention
from keepwarm.trainer.model.decoder import Decoder
from tests.support.parity import Case, model_spec

META = torch.device("meta")
TIMEOUT = timedelta(seconds=60)


def kernel_of(arguments: dict[str, Any], dtype: torch.dtype) -> str:
    """Return the kernel that torch takes on CUDA: the first in its order that supports the arguments.

    By `can_use_flash_attention` and `can_use_mem_efficient_attention` of aten/src/ATen/native/transformers/cuda.
    """
    order = [SDPBackend(one) for one in torch._C._get_sdp_priority_order()]
    assert order.index(SDPBackend.MATH) < order.index(SDPBackend.CUDNN_ATTENTION)
    masked, grouped = arguments["attn_mask"] is not None, arguments["enable_gqa"]
    if not masked and dtype in (torch.bfloat16, torch.float16):
        return "flash"
    return "math" if grouped else "efficient"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the kernel of every attention that is called from now on; those of FlexAttention are its own."""
    found: list[str] = []

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any) -> torch.Tensor:
        assert arguments["enable_gqa"] == (query.shape[1] != key.shape[1] == value.shape[1])
        found.append(kernel_of(arguments, query.dtype))
        return torch.empty_like(query)

    def flex(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        found.append("flex")
        return torch.empty_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex)
    return found


def heads(keys: int, dtype: torch.dtype, *, sequence_first: bool) -> list[torch.Tensor]:
    """Return query, key and value of two samples of 8 tokens and 4 heads of size 16, on a fake GPU."""
    shapes = [(8, 2, count, 16) if sequence_first else (2, 8, count, 16) for count in (4, keys, keys)]
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("engine", ["torch", "megatron"])
def test_attention_on_a_gpu_is_always_fused(
    engine: str, documents: bool, keys: int, dtype: torch.dtype, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTensorMode():
        if engine == "megatron":
            from keepwarm.parallel.megatron.layers import ScaledDotProductAttention

            mask = torch.empty((2, 1, 8, 8), dtype=torch.bool, device="cuda") if documents else None
            mixed = ScaledDotProductAttention(None)(*heads(keys, dtype, sequence_first=True), mask)
            assert mixed.shape == (8, 2, 64)
        else:
            monkeypatch.setattr(attention, "_blocks", lambda *_: object())
            index = torch.empty((2, 8), dtype=torch.int32, device="cuda") if documents else None
            seen = attention.context(None, 8, torch.device("cuda"), index, None)
            query, key, value = heads(keys, dtype, sequence_first=False)
            attention.attend(query, key, value, seen)
    assert len(kernels) == 1
    assert kernels[0] != "math"


@contextmanager
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_megatron_stage_has_every_tensor_on_its_device(
    position: str, precision: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data_mode ddp nothing else moves what Megatron Core or a norm made on the CPU."""
    from keepwarm.parallel.megatron.groups import Groups
    from keepwarm.parallel.megatron.model import build_stages, transformer_config

    spec = model_spec(Case()).model_copy(update={"position": position, "norm": norm, "qk_norm": "head"})
    config = EngineConfig(
        model=Decoder(spec, 1),
        parallel=ParallelSpec(engine="megatron", data=2, data_mode="ddp"),
        optimizer=OptimizerSpec(),
        numerics=NumericsSpec.model_validate({"precision": precision}),
        layout=Layout.of(ParallelSpec(data=2)),
        device=torch.device("cpu"),
        timeout=TIMEOUT,
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: META)
    with two_ranks():
        groups = Groups(config.layout, config.device, TIMEOUT)
        on_meta = replace(config, device=META)
        (gpt,) = build_stages(on_meta, transformer_config(on_meta), groups.collection, (0,))
        groups.close()
    tensors = {**dict(gpt.named_parameters()), **dict(gpt.named_buffers())}
    assert len(tensors) > 10
    assert [name for name, tensor in tensors.items() if tensor.device != META] == []
