"""The four collectives at the boundaries of a tensor-parallel region, with autograd support.

Names and forward/backward pairs follow Megatron-LM (Shoeybi et al., 2019; Korthikanti et al., 2022). The sequence is
dim 1.
"""

from typing import Any

import torch
import torch.distributed as dist

SEQUENCE_DIM = 1

# torch before 2.13 has only the old names; later versions warn about them.
_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter_single = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)


def copy_to(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `x` unchanged; its gradient is summed over `group`."""
    return _Copy.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def reduce_from(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `x` summed over `group`; its gradient passes unchanged."""
    return _Reduce.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather the whole sequence from the parts on the ranks of `group`; the gradient is reduce-scattered."""
    return _Gather.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum `x` over `group` and keep this rank's part of the sequence; the gradient is gathered."""
    return _Scatter.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def _all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = x.new_empty(group.size(), *x.shape)
    _gather_single(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts.movedim(0, SEQUENCE_DIM).flatten(SEQUENCE_DIM, SEQUENCE_DIM + 1)


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = torch.stack(x.chunk(group.size(), SEQUENCE_DIM))
    mine = torch.empty_like(parts[0])
    _reduce_scatter_single(mine, parts.flatten(0, 1), group=group)
    return mine


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(gradients[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce_scatter(gradients[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_gather(gradients[0], ctx.group), None
