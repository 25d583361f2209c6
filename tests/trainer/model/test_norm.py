"""The norm over features that tensor parallelism has split."""

import pytest
import torch
import torch.distributed as dist

from keepwarm.trainer.model.norm import RMSNorm
from tests.support.ranks import run_ranks

FEATURES = 24


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, weight and the gradient of the result."""
    generator = torch.Generator().manual_seed(1)
    x, weight, slope = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in SHAPES)
    return x, weight, slope


SHAPES = ((2, 5, FEATURES), (FEATURES,), (2, 5, FEATURES))


def run(norm: RMSNorm, x: torch.Tensor, weight: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Result and the gradients of input and weight."""
    norm.weight = torch.nn.Parameter(weight.clone())
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(slope)
    assert x.grad is not None
    assert norm.weight.grad is not None
    return out.detach(), x.grad, norm.weight.grad


def _on_a_part() -> tuple[torch.Tensor, ...]:
    width = FEATURES // dist.get_world_size()
    part = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    norm = RMSNorm(FEATURES, 1e-3)
    norm.reduce_group = dist.group.WORLD
    x, weight, slope = inputs()
    return run(norm, x[..., part], weight[part], slope[..., part])


@pytest.mark.dist
def test_rms_norm_split_features_equal_the_whole() -> None:
    whole = run(RMSNorm(FEATURES, 1e-3), *inputs())
    parts = zip(*run_ranks(4, _on_a_part), strict=True)
    for expected, pieces in zip(whole, parts, strict=True):
        torch.testing.assert_close(torch.cat(pieces, dim=-1), expected, rtol=1e-12, atol=1e-12)
