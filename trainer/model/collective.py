"""Sums over an explicit process group, with autograd support."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a parameter, whether or not an engine made it a DTensor."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum `tensor` over the ranks of `group`; the gradient is summed likewise. Both are equal on all ranks."""
    return tensor if group is None else _Sum.apply(tensor, group)  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
