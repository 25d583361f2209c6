"""Losses besides the main one, in every engine: z-loss, and losses of a model's own that need tensors of its own."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch, StepResult
from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.loss import Losses
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.model.decoder import Decoder, StageModule
from tests.support import parity
from tests.support.parity import SAMPLES, Case, HeldShard, Outcome
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

STEPS = range(4)


@functools.cache
def reference(case: Case) -> Outcome:
    return parity.run_case(case.reference, steps=STEPS)


Z = Case(z_loss=1e-2, clipped=True)
Z32 = replace(Z, precision="fp32")
Z_LAYOUTS = [
    replace(Z, tensor=2, pipeline=2, schedule="interleaved", documents=True),
    replace(Z, tensor=2, data=2, sequence=True, tied=True),
    replace(Z32, engine="megatron", tensor=2, pipeline=2, data_mode="ddp"),
    replace(Z32, engine="deepspeed", tensor=2, pipeline=2, micro_batches=4),
    pytest.param(replace(Z, pipeline=2, data=2, schedule="zero_bubble"), marks=pytest.mark.long),
    pytest.param(replace(Z32, engine="megatron", data=2, optimizer="adamw"), marks=pytest.mark.long),
    pytest.param(replace(Z32, engine="deepspeed", data=2, zero_stage=3), marks=pytest.mark.long),
]


@pytest.mark.parametrize("case", Z_LAYOUTS, ids=str)
def test_z_loss_of_a_layout_equals_one_rank(case: Case) -> None:
    """Of one rank it is the formula's: `test_parity.plain_loop`."""
    found = parity.run_case(case, steps=STEPS)
    assert set(found.steps[0].losses) == {"main", "z_loss"}
    assert parity.violations(case, reference(case), found) == []


def test_z_loss_changes_weights_and_is_reported_only_when_set() -> None:
    with_it, without = reference(Z), reference(replace(Z, z_loss=0.0))
    assert set(without.steps[0].losses) == {"main"}
    assert with_it.steps[0].loss == without.steps[0].loss
    assert parity.differing(with_it.state, without.state)


class EnergyStage(StageModule):
    """Adds the mean square of what every layer returns, times the importance that the batch gives each sample."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[torch.Tensor] = []
        for layer in self.layers.values():
            layer.register_forward_hook(lambda layer, inputs, output: self.seen.append(output))

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        documents: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor] | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.seen.clear()
        output = super().forward(x, documents, targets)
        assert targets is not None
        assert importance is not None
        energy = torch.stack([one.square().mean((1, 2)) for one in self.seen]).sum(0)
        energies = {"energy": importance * energy * (targets != IGNORED).sum(1)}
        return output | energies if isinstance(output, dict) else (output, energies)


class EnergyModel(Decoder):
    """A model of another package: no file of an engine knows its loss."""

    def __init__(self, case: Case) -> None:
        super().__init__(parity.model_spec(case), parity.SEED)
        self.loss_weights: Mapping[str, float] = {**self.loss_weights, "energy": 3.0}

    def build_stage(self, layers: range, *, embed: bool, head: bool) -> StageModule:
        return EnergyStage(self.spec, layers, embed=embed, head=head)


def batch_with_importance(case: Case, step: int, engine: Any) -> Batch:
    batch = parity.rank_batch(case, step, engine.layout, dist.get_rank())
    share = SAMPLES // engine.layout.data
    start = engine.layout.coordinates(dist.get_rank()).data * share
    importance = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(step))[start : start + share]
    return replace(batch, extra={"importance": importance.view(case.micro_batches, -1)})


def _train_energy(case: Case) -> tuple[list[StepResult], list[HeldShard], float]:
    engine = parity.make_engine(case, EnergyModel)
    evaluated = engine.evaluate(batch_with_importance(case, 0, engine))
    steps = [engine.step(batch_with_importance(case, step, engine), parity.learning_rate(case, step)) for step in STEPS]
    shards = parity.held_shards(engine)
    engine.close()
    return steps, shards, evaluated.sums["energy"] / evaluated.tokens


def energy_outcome(case: Case) -> Outcome:
    ranks = run_ranks(case.world_size, _train_energy, case, deadline=280.0)
    steps = ranks[0][0]
    assert all(of_rank == steps for of_rank, *_ in ranks)
    assert all(energy == pytest.approx(steps[0].losses["energy"], rel=1e-5) for *_, energy in ranks)
    return Outcome(steps, parity.assemble([shards for _, shards, _ in ranks]))


E32 = Case(precision="fp32", clipped=True)
ENERGY_LAYOUTS = [
    Case(pipeline=2, data=2, z_loss=1e-2),
    Case(pipeline=2, schedule="interleaved", documents=True),
    Case(pipeline=2, tensor=2, schedule="zero_bubble", clipped=True),
    replace(E32, engine="deepspeed", pipeline=2, data=2, micro_batches=4),
    replace(E32, engine="deepspeed", data=2),
]


@pytest.mark.parametrize("case", ENERGY_LAYOUTS, ids=str)
def test_losses_of_every_stage_equal_one_rank(case: Case) -> None:
    expected = energy_outcome(case.reference)
    assert parity.violations(case, expected, energy_outcome(case)) == []
    without = main_losses(parity.run_case(case.reference, steps=STEPS))
    changed = parity.violations(case, without, main_losses(expected))
    assert any(text.startswith("weight") for text in changed)


def main_losses(outcome: Outcome) -> Outcome:
    """The outcome with its main loss alone."""
    return replace(outcome, steps=[replace(step, losses={"main": step.loss}) for step in outcome.steps])


def _refused_by_megatron() -> None:
    with pytest.raises(EngineUnavailable, match=r"parallel\.engine = megatron: no loss \['energy'\]"):
        parity.make_engine(Case(engine="megatron", precision="fp32"), EnergyModel)


def test_losses_unsupported_by_megatron_are_refused() -> None:
    run_ranks(1, _refused_by_megatron)


def test_losses_without_a_weight_are_refused() -> None:
    losses = Losses({"main": 1.0}, torch.device("cpu"))
    forward = losses.collected(lambda x: {"main": x, "other": x})
    with pytest.raises(ValueError, match=r"\['other'\]; loss_weights has \['main'\]"):
        forward(torch.ones(2))
