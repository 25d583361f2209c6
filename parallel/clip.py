"""The gradient over all axes of the mesh: what is left to sum after backward, its 2-norm, and clipping."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from parallel.parameter import Held, local_of


def finish(parameters: Iterable[Held]) -> None:
    """Sum gradients that are still partial over the tensor axis and hand all of them to the local parameters.

    Norms under sequence parallelism see part of the sequence on each rank; where FSDP reduces the gradient it has
    summed these already.
    """
    for held in parameters:
        gradient = held.parameter.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            gradient = gradient.redistribute(placements=[Replicate()] * len(gradient.placements))
        held.local.grad = None if gradient is None else local_of(gradient)


def squared_norm(parameters: Sequence[Held], rank: int, device: torch.device) -> torch.Tensor:
    """This rank's part of the squared 2-norm, 0-dim fp64: each box counts on the first of the ranks that hold it.

    Summed over the world it is the squared norm of the whole gradient, with every replicated or tied parameter
    counted once.
    """
    mine = [held.local.grad for held in parameters if held.replicas[0] == rank and held.local.grad is not None]
    if not mine:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm([gradient for gradient in mine if gradient.numel()]))
    return norms.double().square().sum()


def clip(parameters: Iterable[Held], norm: float, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit`; torch's epsilon of 1e-6 in the quotient."""
    factor = limit / (norm + 1e-6)
    gradients = [held.local.grad for held in parameters if held.local.grad is not None]
    if factor < 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


def sum_ends(gradient: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Add up, in place, the gradients of the two copies of tied embeddings at the ends of the pipeline."""
    dist.all_reduce(gradient, group=group)
