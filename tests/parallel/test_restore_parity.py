"""An optimizer that is restored in a new process goes on as if it had never stopped."""

import sys
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest
import torch

from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.native.engine import TorchEngine
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.trainer.model.decoder import Decoder
from tests.support.parity import Case, equal_bits, model_spec, rank_batch

OPTIMIZERS = {
    "adamw": OptimizerSpec(),
    "apex": OptimizerSpec(implementation="apex"),
    "momentum": OptimizerSpec(name="sgd", momentum=0.9),
    "sgd": OptimizerSpec(name="sgd"),
}


class FusedAdam(torch.optim.Optimizer):
    """The structure of Apex's (apex/optimizers/fused_adam.py): the first step puts the counter into each group, and
    moments into the state of parameters that have none.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
                p.addcdiv_(state["exp_avg"] / (1 - beta1**step), denominator, value=-group["lr"])


@pytest.fixture(autouse=True)
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def engine_of(optimizer: OptimizerSpec) -> TorchEngine:
    return TorchEngine(
        EngineConfig(
            model=Decoder(model_spec(Case()), 1),
            parallel=ParallelSpec(),
            optimizer=optimizer,
            numerics=NumericsSpec(),
            layout=Layout.of(ParallelSpec()),
            device=torch.device("cpu"),
            timeout=timedelta(seconds=60),
        )
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_updates_as_the_one_that_went_on(name: str) -> None:
    went_on, restored = engine_of(OPTIMIZERS[name]), engine_of(OPTIMIZERS[name])
    layout = Layout.of(ParallelSpec())
    for step in range(3):
        went_on.step(rank_batch(Case(), step, layout, 0), 1e-3)
    saved = went_on.state()
    for key, shard in restored.state().items():
        shard.local.copy_(saved[key].local)
    restored.restored()
    for step in range(3, 5):
        for engine in (went_on, restored):
            engine.step(rank_batch(Case(), step, layout, 0), 1e-3)
    found = restored.state()
    assert [key for key, shard in went_on.state().items() if not equal_bits(shard.local, found[key].local)] == []
    went_on.close()
    restored.close()
