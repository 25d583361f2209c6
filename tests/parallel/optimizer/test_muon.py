"""Muon: whole matrices are orthogonalised, in every layout alike."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from keepwarm.parallel.engine import StepResult
from keepwarm.parallel.optimizer.muon import orthogonalised
from tests.support import parity
from tests.support.models import whole_model
from tests.support.parity import SEED, STEPS, Case, Outcome

BETA = 0.95
CASES = [
    Case(data=4, masks="equal"),
    Case(tensor=2, data=2, sequence=True, clipped=True),
    Case(tensor=2, pipeline=2, data=2, schedule="interleaved", data_mode="keep", documents=True),
    Case(data=4, data_mode="hsdp"),
]


def polynomial(values: torch.Tensor) -> torch.Tensor:
    """What five Newton-Schulz iterations make of singular values."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The same result without iterations."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag(polynomial(values / values.square().sum().sqrt().clamp(min=1e-7))) @ v


def plain_loop(case: Case) -> Outcome:
    """The same training of one model in one batch; nothing of it is in `parallel`."""
    model = whole_model(parity.model_spec(case), SEED, torch.float64)
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if name.startswith("layers.") and p.ndim == 2}
    rest = {name: p for name, p in named.items() if name not in matrices}
    groups = [
        {"params": [p for name, p in rest.items() if ("norm" in name) == plain], "weight_decay": 0.0 if plain else 0.1}
        for plain in (False, True)
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    steps = []
    for step in range(STEPS):
        tokens, targets, documents = parity.global_batch(case, step)
        loss = F.cross_entropy(model(tokens, documents=documents).flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        limit = parity.CLIP_NORM if case.clipped else torch.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        rate = parity.learning_rate(case, step)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        with torch.no_grad():
            for name, p in matrices.items():
                assert p.grad is not None
                momenta[name] = BETA * momenta[name] + (1 - BETA) * p.grad
                update = by_singular_values(BETA * momenta[name] + (1 - BETA) * p.grad)
                p.sub_(rate * 0.1 * p + rate * 0.2 * math.sqrt(max(p.shape)) * update)
        model.zero_grad()
        counted = int((targets != -100).sum())
        steps.append(StepResult(losses={"main": loss.item()}, tokens=counted, grad_norm=norm.item(), skipped=False))
    return Outcome(steps, {f"model.{name}": p.detach() for name, p in named.items()})


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (1, 4)])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalised(matrix), by_singular_values(matrix), rtol=1e-9, atol=1e-11)


def test_newton_schulz_of_zeros_is_zero_and_large_matrices_come_near_one() -> None:
    assert not orthogonalised(torch.zeros(4, 4)).any()
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert 0.6 < values.min() < values.max() < 1.3


def test_update_in_bf16_is_that_of_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 16))
    weight.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    theirs = torch.optim.Muon([weight], lr=0.1, momentum=BETA, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    theirs.step()
    looking_ahead = weight.grad * ((1 - BETA) * (1 + BETA))
    ours = orthogonalised(looking_ahead.bfloat16()).float() * -0.1 * 0.2 * math.sqrt(24)
    torch.testing.assert_close(ours, weight.detach(), rtol=0.05, atol=2e-3)


@pytest.mark.dist
@pytest.mark.parametrize("case", [Case(clipped=True), Case(documents=True, tied=True)], ids=str)
def test_muon_on_one_rank_equals_a_plain_loop(case: Case) -> None:
    case = replace(case, optimizer="muon")
    assert parity.violations(case, plain_loop(case), parity.run_case(case)) == []


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids=str)
def test_muon_in_every_layout_equals_one_rank(case: Case) -> None:
    case = replace(case, optimizer="muon")
    assert parity.violations(case, parity.run_case(case.reference), parity.run_case(case)) == []


@pytest.mark.dist
def test_muon_goes_on_from_its_state_bit_by_bit() -> None:
    case = Case(tensor=2, data=2, optimizer="muon")
    half = parity.run_case(case, steps=range(10))
    assert {name.split(".")[1] for name in half.state if name.startswith("optimizer.")} >= {"momentum", "exp_avg"}
    assert not any(name.startswith("optimizer.exp_avg.layers.0.mlp.up.weight") for name in half.state)
    whole, resumed = parity.run_case(case), parity.run_case(case, steps=range(10, STEPS), start=half.state)
    assert parity.differing(whole.state, resumed.state) == []
    assert resumed.steps == whole.steps[10:]
