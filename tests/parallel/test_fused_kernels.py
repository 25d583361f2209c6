"""Fused kernels that are not part of PyTorch compute what PyTorch computes; they need a GPU and what they come with."""

import importlib
import importlib.util
from datetime import timedelta

import pytest
import torch

from launch.doctor import APEX_INSTALL, APEX_KERNELS
from parallel.engine_support import ENGINES
from parallel.layout import Layout
from parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from tests.support import parity
from tests.support.parity import Case
from trainer.model.decoder import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def losses(engine: str, optimizer: OptimizerSpec) -> list[float]:
    """Of 20 steps of the tiny model on one device."""
    case, parallel = Case(precision="fp32"), ParallelSpec.model_validate({"engine": engine})
    info, layout = ENGINES[parallel.engine], Layout.of(parallel)
    made = getattr(importlib.import_module(info.module), info.name)(
        Decoder(parity.model_spec(case), parity.SEED),
        parallel,
        optimizer,
        NumericsSpec(),
        layout,
        device=torch.device("cuda", 0),
        timeout=timedelta(seconds=60),
    )
    steps = [made.step(parity.rank_batch(case, step, layout, 0), 1e-3) for step in range(parity.STEPS)]
    made.close()
    return [step.loss for step in steps]


@pytest.mark.skipif(
    importlib.util.find_spec(APEX_KERNELS) is None, reason=f"Apex's kernels are not installed: {APEX_INSTALL}"
)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_fused_adam_of_apex_computes_what_torch_computes(engine: str) -> None:
    fused = losses(engine, OptimizerSpec(implementation="apex"))
    assert fused == pytest.approx(losses(engine, OptimizerSpec()), rel=1e-5)
