"""The gradient over all axes of the mesh: what is left to sum after backward, its 2-norm, and clipping."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from keepwarm.parallel.parameter import ShardedParameter, local_of


class Gradient(NamedTuple):
    """The gradient of what this rank updates of one parameter."""

    tensor: torch.Tensor
    """Live: clipping scales it in place."""
    replicas: tuple[int, ...]
    """Ranks, ascending, that hold the gradient of the same elements."""


def finish(parameters: Iterable[ShardedParameter]) -> None:
    """Sum gradients that are still partial over the tensor axis and hand all of them to the local parameters.

    Norms under sequence parallelism see part of the sequence on each rank; where FSDP reduces the gradient it has
    summed these already.
    """
    for sharded in parameters:
        gradient = sharded.parameter.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            gradient = gradient.redistribute(placements=[Replicate()] * len(gradient.placements))
        sharded.local.grad = None if gradient is None else local_of(gradient)


def gradients_of(parameters: Iterable[ShardedParameter]) -> list[Gradient]:
    """The gradients of the local parameters; parameters without one are left out."""
    return [Gradient(sharded.local.grad, sharded.replicas) for sharded in parameters if sharded.local.grad is not None]


def squared_norm(gradients: Iterable[Gradient], rank: int, device: torch.device) -> torch.Tensor:
    """This rank's part of the squared 2-norm, 0-dim fp64: each gradient counts on the first of the ranks that hold it.

    Summed over the world it is the squared norm of the whole gradient, with every replicated or tied parameter
    counted once.
    """
    mine = [one.tensor for one in gradients if one.replicas[0] == rank and one.tensor.numel()]
    if not mine:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(mine)).double().square().sum().to(device)


def clip(gradients: Iterable[Gradient], norm: float, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit`; torch's epsilon of 1e-6 in the quotient."""
    factor = limit / (norm + 1e-6)
    tensors = [one.tensor for one in gradients]
    if factor < 1.0 and tensors:
        torch._foreach_mul_(tensors, factor)


def sum_ends(gradient: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Add up, in place, the gradients of the two copies of tied embeddings at the ends of the pipeline."""
    dist.all_reduce(gradient, group=group)
