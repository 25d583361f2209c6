"""Gradients over all axes of the mesh: the sums that remain after backward, the 2-norm, and clipping."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from keepwarm.parallel.parameter import ShardedParameter, local_of


class Gradient(NamedTuple):
    """Gradient of the elements of one parameter that this rank updates."""

    tensor: torch.Tensor
    """The live gradient: clipping scales it in place."""
    replicas: tuple[int, ...]
    """Ranks that hold the gradient of the same elements, ascending."""


def finish(parameters: Iterable[ShardedParameter], *, coalesce: bool) -> None:
    """Sum gradients that are still partial over the tensor axis, and assign all gradients to the local parameters.

    Under sequence parallelism, norms see part of the sequence on each rank. Where FSDP reduces their gradients, it has
    already summed them.

    Args:
        coalesce: sum them in one all-reduce. On CPUs each has its own: gloo's order of summation depends on where an
            element lies in the buffer.
    """
    partial: list[tuple[ShardedParameter, DTensor]] = []
    for sharded in parameters:
        gradient = sharded.parameter.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            if coalesce and gradient.device_mesh.ndim == 1:
                partial.append((sharded, gradient))
                continue
            gradient = gradient.redistribute(placements=[Replicate()] * len(gradient.placements))
        sharded.local.grad = None if gradient is None else local_of(gradient)
    if partial:
        locals_ = [gradient.to_local() for _, gradient in partial]
        flat = torch.cat([one.reshape(-1) for one in locals_])
        dist.all_reduce(flat, group=partial[0][1].device_mesh.get_group())
        totals = torch.split(flat, [one.numel() for one in locals_])
        for (sharded, _), one, total in zip(partial, locals_, totals, strict=True):
            sharded.local.grad = total.view(one.shape)


def gradients_of(parameters: Iterable[ShardedParameter]) -> list[Gradient]:
    """Return the gradients of the local parameters; parameters without one are left out."""
    return [Gradient(sharded.local.grad, sharded.replicas) for sharded in parameters if sharded.local.grad is not None]


def squared_norm(gradients: Iterable[Gradient], rank: int, device: torch.device) -> torch.Tensor:
    """Return this rank's part of the squared 2-norm, 0-dim fp64: each gradient counts on its first holder only.

    Summed over the world, the parts are the squared norm of the whole gradient, with every replicated or tied parameter
    counted once.
    """
    mine = [one.tensor for one in gradients if one.replicas[0] == rank and one.tensor.numel()]
    if not mine:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(mine)).double().square().sum().to(device)


def clip(gradients: Iterable[Gradient], norm: float, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit`; like torch, add 1e-6 to the divisor."""
    factor = limit / (norm + 1e-6)
    tensors = [one.tensor for one in gradients]
    if factor < 1.0 and tensors:
        torch._foreach_mul_(tensors, factor)


def sum_copies(gradient: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Add up, in place, the gradients of copies: of tied embeddings at the ends of the pipeline, of key-value heads."""
    dist.all_reduce(gradient, group=group)
