"""Fused kernels that are not part of PyTorch compute what PyTorch computes; they need a GPU and what they come with."""

from datetime import timedelta

import pytest
import torch

from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.engine_registry import ENGINES
from keepwarm.parallel.engine_support import registered_engine
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


def losses(
    engine: str, *, adam: str = "torch", norms: str = "torch", options: dict[str, bool] | None = None
) -> list[float]:
    """Of 20 steps of the tiny model on one device."""
    case = Case(precision="fp32")
    spec = ParallelSpec.model_validate({"engine": engine, "options": options or {}})
    optimizer = OptimizerSpec.model_validate({"implementation": adam})
    numerics = NumericsSpec.model_validate({"norms": norms})
    layout = Layout.of(spec)
    made = registered_engine(spec.engine).engine_class()(
        EngineConfig(
            model=Decoder(parity.model_spec(case), parity.SEED, norms=numerics.norms),
            parallel=spec,
            optimizer=optimizer,
            numerics=numerics,
            layout=layout,
            device=torch.device("cuda", 0),
            timeout=timedelta(seconds=60),
        )
    )
    steps = [made.step(parity.rank_batch(case, step, layout, 0), 1e-3) for step in range(parity.STEPS)]
    made.close()
    return [step.loss for step in steps]


@there(ADAM)
@pytest.mark.parametrize("engine", ENGINES.names())
def test_apex_adam_equals_torch(engine: str) -> None:
    assert losses(engine, adam="apex") == pytest.approx(losses(engine), rel=1e-5)


@there(NORMS)
@pytest.mark.parametrize("engine", ENGINES.names())
def test_apex_norms_equal_torch(engine: str) -> None:
    assert losses(engine, norms="apex") == pytest.approx(losses(engine), rel=1e-5)


@there(TRANSFORMER_ENGINE)
def test_transformer_engine_layers_equal_megatron_core() -> None:
    fused = losses("megatron", options={"transformer_engine": True})
    assert fused == pytest.approx(losses("megatron"), rel=1e-3)  # its products of fp32 matrices may be in TF32
