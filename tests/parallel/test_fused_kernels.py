"""Fused kernels that are not part of PyTorch compute what PyTorch computes; they need a GPU and what they come with."""

import importlib
from datetime import timedelta

import pytest
import torch

from keepwarm.parallel.engine_support import ENGINES
from keepwarm.parallel.kernels import ADAM, NORMS, TRANSFORMER_ENGINE, Kernel
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.trainer.model.decoder import Decoder
from tests.support import parity
from tests.support.parity import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def there(kernel: Kernel) -> pytest.MarkDecorator:
    """Skip where these kernels are missing."""
    return pytest.mark.skipif(kernel.missing, reason=f"{kernel.name} is not installed: {kernel.install}")


def losses(engine: str, *, adam: str = "torch", norms: str = "torch", transformer_engine: bool = False) -> list[float]:
    """Of 20 steps of the tiny model on one device."""
    case = Case(precision="fp32")
    spec = ParallelSpec.model_validate({"engine": engine, "transformer_engine": transformer_engine})
    optimizer = OptimizerSpec.model_validate({"implementation": adam})
    numerics = NumericsSpec.model_validate({"norms": norms})
    info, layout = ENGINES[spec.engine], Layout.of(spec)
    made = getattr(importlib.import_module(info.module), info.name)(
        Decoder(parity.model_spec(case), parity.SEED, norms=numerics.norms),
        spec,
        optimizer,
        numerics,
        layout,
        device=torch.device("cuda", 0),
        timeout=timedelta(seconds=60),
    )
    steps = [made.step(parity.rank_batch(case, step, layout, 0), 1e-3) for step in range(parity.STEPS)]
    made.close()
    return [step.loss for step in steps]


@there(ADAM)
@pytest.mark.parametrize("engine", ENGINES)
def test_apex_adam_equals_torch(engine: str) -> None:
    assert losses(engine, adam="apex") == pytest.approx(losses(engine), rel=1e-5)


@there(NORMS)
@pytest.mark.parametrize("engine", ENGINES)
def test_apex_norms_equal_torch(engine: str) -> None:
    assert losses(engine, norms="apex") == pytest.approx(losses(engine), rel=1e-5)


@there(TRANSFORMER_ENGINE)
def test_transformer_engine_layers_equal_megatron_core() -> None:
    fused = losses("megatron", transformer_engine=True)
    assert fused == pytest.approx(losses("megatron"), rel=1e-3)  # its products of fp32 matrices may be in TF32
