"""Every layout computes what one rank computes, and one rank computes what a plain PyTorch loop does."""

import functools
import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from keepwarm.parallel.engine import StepResult
from tests.support import parity
from tests.support.covering import VALUES, covering_cases, is_valid, pairs_of
from tests.support.models import whole_model
from tests.support.parity import CLIP_NORM, SEED, STEPS, Case, Outcome

pytestmark = pytest.mark.dist

GIVEN = [
    Case(tensor=2, pipeline=2, data=2, sequence=True, tied=True, clipped=True, optimizer="adamw"),
    Case(tensor=2, pipeline=2, data=2, schedule="interleaved", data_mode="keep", documents=True, precision="fp32"),
    Case(tensor=2, pipeline=2, data=2, schedule="zero_bubble", data_mode="ddp", sequence=True, clipped=True),
]
COVERING = covering_cases(GIVEN, seed=0)
EXTRA = [
    Case(data=4, data_mode="hsdp", clipped=True),
    Case(data=4, data_mode="hsdp", optimizer="adamw", tied=True, documents=True),
    Case(data=4, data_mode="hsdp", accumulate="sharded", optimizer="adamw", clipped=True),
    Case(pipeline=2, layer_split=(1, 3), tied=True, clipped=True),
    Case(pipeline=2, schedule="interleaved", layer_split=(1, 1, 1, 1)),
    Case(pipeline=4, tied=True, clipped=True, micro_batches=4),
]
LARGE = [
    Case(data=4, data_mode="hsdp", precision="fp32"),
    Case(data=4, tensor=2, data_mode="hsdp", sequence=True, clipped=True),
    Case(tensor=4, sequence=True, documents=True),
]
"""Too slow for every day."""


@functools.cache
def reference(case: Case) -> Outcome:
    """The run on one rank that `case` must agree with."""
    return parity.run_case(case.reference)


def plain_loop(case: Case) -> Outcome:
    """The same training without any of `parallel`: one model, one batch, PyTorch's own loss, clipping and optimizer."""
    dtype = torch.float64 if case.precision == "fp64" else torch.float32
    model = whole_model(parity.model_spec(case), SEED, dtype)
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    plain = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    if case.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for step in range(STEPS):
        tokens, targets, documents = parity.global_batch(case, step)
        logits = model(tokens, documents=documents)
        losses = {"main": F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)}
        if case.z_loss:
            losses["z_loss"] = logits.logsumexp(-1)[targets != -100].square().mean()
        (losses["main"] + case.z_loss * losses.get("z_loss", 0)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM if case.clipped else torch.inf)
        for group in optimizer.param_groups:
            group["lr"] = parity.learning_rate(case, step)
        optimizer.step()
        optimizer.zero_grad()
        tokens_counted = int((targets != -100).sum())
        means = {name: loss.item() for name, loss in losses.items()}
        steps.append(StepResult(losses=means, tokens=tokens_counted, grad_norm=norm.item(), skipped=False))
    return Outcome(steps, {f"model.{name}": p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("precision", VALUES["precision"])
@pytest.mark.parametrize("optimizer", VALUES["optimizer"])
@pytest.mark.parametrize("variant", ["plain", "tied", "documents-clipped", "equal", "z-loss"])
def test_parity_one_rank_equals_plain_loop(variant: str, optimizer: str, precision: str) -> None:
    case = Case(
        tied=variant == "tied",
        documents="documents" in variant,
        clipped="clipped" in variant,
        masks="equal" if variant == "equal" else "unequal",
        z_loss=1e-2 if variant == "z-loss" else 0.0,
        optimizer=optimizer,
        precision=precision,
    )
    assert parity.violations(case, plain_loop(case), reference(case)) == []


def test_parity_reference_learns_and_is_clipped_at_every_step() -> None:
    for optimizer in ("sgd", "adamw"):
        steps = reference(Case(clipped=True, optimizer=optimizer)).steps
        assert min(step.grad_norm for step in steps) > CLIP_NORM
        assert len({step.tokens for step in steps}) > STEPS // 2
        weights = reference(Case(optimizer=optimizer)).steps
        assert weights[-1].loss < weights[0].loss - 0.1


@pytest.mark.parametrize(
    "case", [*COVERING, *EXTRA, *(pytest.param(case, marks=pytest.mark.long) for case in LARGE)], ids=str
)
def test_parity_layout_equals_one_rank(case: Case) -> None:
    assert parity.violations(case, reference(case), parity.run_case(case)) == []


def test_parity_cases_cover_every_pair() -> None:
    covered = set().union(*map(pairs_of, COVERING))
    possible = {pair for case in _every_layout() for pair in pairs_of(case)}
    assert possible <= covered
    assert {(c.tensor, c.pipeline, c.data) for c in COVERING} >= {(1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 2)}


def _every_layout() -> list[Case]:
    """The full product of the axes, with masks, documents, recompute and micro-batches drawn for each."""
    drawn = ("recompute", "micro_batches", "masks", "documents")
    names = [name for name in VALUES if name not in drawn]
    choose = random.Random(0)
    cases = []
    for values in itertools.product(*(VALUES[name] for name in names)):
        case = replace(Case(), **dict(zip(names, values, strict=True)))
        if is_valid(case):
            cases.append(replace(case, **{name: choose.choice(VALUES[name]) for name in drawn}))
    return cases


def _long_cases() -> list[Case]:
    return [case for case in _every_layout() if (case.optimizer, case.precision) != ("adamw", "fp32")]


@pytest.mark.long
@pytest.mark.parametrize("case", _long_cases(), ids=str)
def test_parity_full_product_equals_one_rank(case: Case) -> None:
    assert parity.violations(case, reference(case), parity.run_case(case)) == []
